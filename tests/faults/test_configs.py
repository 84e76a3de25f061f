"""Configurations of group K: every bad one ends with 2, at once, in lines that say what to change and where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.stages.project import SETTINGS, Project, new_project

ERROR = re.compile(r"error\[[a-z][a-z_.]+\] .+ \(.+\).*\. fix: .+")
HUGE = "9" * 5000
# A line for each table of the settings, and what the first error is called.
LINES = {
    "[train]\nlerning_rate = 1e-4": "config.unknown_key",
    "[trian]\nsteps = 1": "config.unknown_key",
    "[train]\nsteps = 5\nsteps = 6": "config.not_toml",
    '[train]\nsteps = "5"': "config.wrong_value",
    "[train]\nsteps = 5.0": "config.wrong_value",
    "[train]\nsteps = true": "config.wrong_value",
    "[train]\nsteps = -1": "config.wrong_value",
    "[train]\nsteps = 0": "config.wrong_value",
    f"[train]\nsteps = {2**63}": "config.wrong_value",
    f"[train]\nsteps = {HUGE}": "config.not_toml",
    "[train]\nlearning_rate = nan": "config.not_finite",
    "[train]\nlearning_rate = inf": "config.not_finite",
    "[train]\nlearning_rate = 1e999": "config.not_finite",
    "[train]\nlearning_rate = -1e-4": "config.wrong_value",
    "[train]\nclip_norm = -inf": "config.not_finite",
    "[train.optimizer]\nkind = 'adam'": "config.unknown_kind",
    "[run]\nname = '../../x'": "config.wrong_value",
    "[run]\nname = '/x'": "config.wrong_value",
    "[run]\nname = '~'": "config.wrong_value",
    "[run]\nname = '$HOME'": "config.wrong_value",
    "[run]\nseed = -1": "config.wrong_value",
    '[preview]\nprompts = ["a\\u0000b"]': "config.wrong_value",
    '[preview]\nprompts = ["\\u001b[31mred"]': "config.wrong_value",
    '[train.preservation]\nkind = "output"\nclass_word = "c\\u009b2J"': "config.wrong_value",
    '[train.preservation]\nkind = "output"\nclass_word = ["cat", "\\u0000"]': "config.wrong_value",
    f"[run]\n{'a.' * 20_000}b = 1": "config.too_deep",
    f"x = {'[' * 50_000}": "config.too_deep",
    f"# {'x' * (10 << 20)}": "config.too_large",
    "\x1b[31m = 1": "config.not_toml",
    '"\\u001b[31m" = 1': "config.unknown_key",
    "[[[": "config.not_toml",
}
MEASURE = """
import resource, sys, time
from pathlib import Path
from schemas.errors import BadConfig
from stages.contract.config import load_config
started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_config(Path(sys.argv[1]))
except BadConfig:
    print(time.monotonic() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def written(project: Project, lines: str) -> None:
    """Put lines into the project's configuration: a table that is there already gives way."""
    table = lines.partition("\n")[0]
    project.config.write_text(f'[validate]\ndataset = "pictures"\n\n{lines}\n' if table != "x" else lines)


@pytest.mark.bar("Q20")
def test_every_wrong_configuration_ends_with_2_and_says_what_to_change(tmp_path: Path, measured: Measured) -> None:
    project = new_project(tmp_path)
    ended: dict[str, tuple[int, str]] = {}
    for lines in LINES:
        written(project, lines)
        ran = project.run("train")
        ended[lines] = (ran.code, ran.error)
        said = ran.stderr.splitlines()
        assert said, lines[:80]
        assert all(ERROR.fullmatch(line) and line.isprintable() and len(line) < 2000 for line in said), said
        assert str(project.config) in ran.stderr
    good = [lines for lines, code in LINES.items() if ended[lines] == (2, code)]
    measured("Q20", f"configurations: {len(good)} of {len(LINES)} end with 2, their code, the file and a fix")
    assert {lines[:60]: ended[lines] for lines in LINES if lines not in good} == {}


@pytest.mark.parametrize("shape", ["pipe", "folder", "device", "unreadable", "absent", "loop"])
def test_configuration_that_is_no_file_ends_with_2_at_once(tmp_path: Path, shape: str) -> None:
    project = new_project(tmp_path)
    project.config.unlink()
    match shape:
        case "pipe":
            os.mkfifo(project.config)
        case "folder":
            project.config.mkdir()
        case "device":
            project.config.symlink_to("/dev/zero")
        case "loop":
            project.config.symlink_to(project.config)
        case "unreadable":
            project.config.write_text(SETTINGS)
            project.config.chmod(0)
            if os.geteuid() == 0:
                pytest.skip("root reads everything")
    started = time.monotonic()
    ran = project.run("validate")
    assert (ran.code, time.monotonic() - started < 2) == (2, True)
    assert ERROR.fullmatch(ran.stderr.strip())
    assert ("no such" in ran.stderr) is (shape in ("absent", "loop"))
    assert ("not a file" in ran.stderr) is (shape in ("pipe", "folder", "device"))


@pytest.mark.parametrize(
    "text",
    [
        f"{'a.' * 20_000}b = 1\n",
        f"x = {'[' * 100_000}",
        f"x = {'{a=' * 50_000}",
        "#" * (64 << 20),
        f"x = {'9' * 200_000}",
    ],
    ids=["dotted", "lists", "tables", "64 MB", "digits"],
)
def test_bomb_takes_less_than_a_second_and_200_megabytes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bomb.toml"
    path.write_text(text)
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 1
    assert megabytes < 200


@pytest.mark.parametrize("trigger", ["a\\u0000b", "\\u001b[31mred", "a\\u009b2J", "a\\u007f"])
def test_trigger_holds_nothing_that_a_caption_may_not(tmp_path: Path, trigger: str) -> None:
    ran = new_project(tmp_path).run("validate", sets=(f'validate.trigger="{trigger}"',))
    assert (ran.code, ran.error) == (2, "config.wrong_value")
    assert ERROR.fullmatch(ran.stderr.strip())
    assert ran.stderr.strip().isprintable()


def test_nothing_but_a_home_folder_in_front_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", "pictures")
    project = new_project(tmp_path)
    monkeypatch.setenv("HOME", str(project.root))
    for name in ("$PICTURES", "${PICTURES}", "there/~/pictures", "%(PICTURES)s", "$(echo pictures)"):
        ran = project.run("validate", sets=(f'validate.dataset="{name}"',))
        assert (ran.code, ran.error) == (2, "dataset.absent")
        assert name in ran.stderr
