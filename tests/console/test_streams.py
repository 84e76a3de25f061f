"""The standard streams: closed, full or left by their reader they cost lines, never the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "pipelines" / "demo.toml"
FULL = Path("/dev/full")
RESOURCES = 7
# What a program says and does with streams that are steady.
SPEAKING = """
import sys
from stages.console.streams import steady
steady()
for number in range(1000):
    print("said", file=sys.stderr)
print(sys.stdin.read(), "done", sys.stderr.isatty())
"""


def spoken(redirection: str) -> subprocess.CompletedProcess[str]:
    line = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, SPEAKING]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment, input="heard")


def validated(tmp_path: Path, redirection: str) -> subprocess.CompletedProcess[str]:
    line = ["sh", "-c", f'exec "$0" -m stages "$@" {redirection}', sys.executable, "validate", "--json"]
    places = ["--config", DEMO, "--store", tmp_path / "store", "--runs", tmp_path / "runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*line, *places], capture_output=True, text=True, check=False, env=environment)


def test_what_stderr_takes_is_written() -> None:
    found = spoken("")
    assert (found.returncode, found.stdout, found.stderr) == (0, "heard done False\n", "said\n" * 1000)


@pytest.mark.parametrize(
    ("redirection", "out"),
    [
        ("2>&-", "heard done False\n"),
        ("<&-", " done False\n"),
        (">&-", ""),
        ("<&- >&- 2>&-", ""),
        pytest.param(
            f"2>{FULL}", "heard done False\n", marks=pytest.mark.skipif(not FULL.exists(), reason="no full device")
        ),
    ],
)
def test_stream_that_is_closed_or_full_ends_nothing(redirection: str, out: str) -> None:
    found = spoken(redirection)
    assert (found.returncode, found.stdout) == (0, out)
    assert found.stderr == ("said\n" * 1000 if "2>" not in redirection else "")


def test_file_is_never_opened_in_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what is said would be written into it."""
    found = validated(tmp_path, "2>&-")
    assert (found.returncode, json.loads(found.stdout)["status"]) == (0, "built")
    assert validated(tmp_path, ">&- 2>&-").returncode == 0
    assert json.loads(validated(tmp_path, "").stdout)["status"] == "up to date"


@pytest.mark.skipif(not FULL.exists(), reason="no full device")
def test_result_that_finds_no_room_is_an_error_in_words(tmp_path: Path) -> None:
    found = validated(tmp_path, f">{FULL}")
    assert (found.returncode, found.stdout) == (RESOURCES, "")
    assert found.stderr.splitlines()[-1].startswith("error[disk.full] the disk is full (/dev/stdout): ")
    # An error, too: its own code, and no second one about the result.
    found = validated(tmp_path, f"--set run.seed=x >{FULL}")
    assert (found.returncode, found.stderr.count("error[")) == (2, 1)
