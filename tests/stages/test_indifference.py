"""What must not matter does not: surroundings and flags leave every digest and the LoRA's very bytes as they are.

Each case is the whole making in a process of its own, told to differ from the plain one in a few things at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pytest

from tests.stages.project import Project, draw, edit, new_project

ROOT = Path(__file__).parents[2]
STAGES = ("validate", "encode-latents", "encode-text", "train")
# Every stage in one process, its object on stdout; only verify may find the chain unfinished.
CHAIN = """
import json, sys
from stages.cli import run
for line in json.loads(sys.argv[1]):
    if (code := run(line)) and line[0] != "verify":
        sys.exit(code)
"""
PLAIN = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
# Python itself turns to UTF-8 in this locale unless it is told not to.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TWO = {"OPENBLAS_NUM_THREADS": "2"}
QUIET = ("preview.during_training=false",)


@dataclass(frozen=True)
class Case:
    """What is different: environment, folder of the project, current folder, settings, flags, stages."""

    environment: dict[str, str] = field(default_factory=dict[str, str])
    folder: str = "project"
    inside: bool = False
    sets: tuple[str, ...] = (*QUIET, "train.checkpoint_every=3")
    flags: tuple[str, ...] = ()
    of_train: tuple[str, ...] = ()
    verified: bool = False


CASES = {
    "plain": Case(),
    # A locale that is not installed counts as C; Python's own rules then decide.
    "turkish, far east": Case({"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"}),
    "ascii, far west": Case({**ASCII, "TZ": "America/Anchorage"}),
    "hashes, elsewhere": Case({"PYTHONHASHSEED": "4711"}, folder="an other/and much deeper/place", inside=True),
    "said nothing": Case(flags=("--quiet", "--explain", "--wait", "--paranoid")),
    "checkpoints, pictures": Case(sets=("train.checkpoint_every=1",)),
    "verified, profiled": Case(verified=True, of_train=("--profile", "2")),
}
TWO_THREADS = {
    "plain": Case(TWO),
    "otherwise": Case({**TWO, "PYTHONHASHSEED": "12"}, folder="far", flags=("--quiet",)),
}


@dataclass(frozen=True)
class Found:
    """Key and digest of every stage, the sha256 of the LoRA file, and what the steps came to."""

    keys: dict[str, str]
    digests: dict[str, str]
    lora: str
    losses: list[float]
    grad_norms: list[float]


def project_at(root: Path) -> Project:
    """Return a project with letters that other languages case, sort and encode differently."""
    project = new_project(root)
    draw(project.pictures, "INDIGO", (9, 99, 199), "a [trigger] in İstanbul, on a Straße")
    edit(project.config, "steps = 4", "steps = 3")
    return project


def made(case: Case, root: Path) -> Found:
    """Make the LoRA of a project of its own."""
    project = project_at(root / case.folder)
    at = Path() if case.inside else project.root
    where = ["--config", at / project.config.name, "--store", at / "store", "--runs", at / "runs", "--json"]
    common = [*map(str, where), *(part for each in case.sets for part in ("--set", each)), *case.flags]
    lines = []
    for stage in STAGES:
        lines.append([stage, *common, *(case.of_train if stage == "train" else ())])
        lines += [["verify", *common]] if case.verified else []
    found = subprocess.run(
        [sys.executable, "-c", CHAIN, json.dumps(lines)],
        capture_output=True,
        check=False,
        cwd=project.root if case.inside else root,
        env={**os.environ, **PLAIN, **case.environment, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, found.stderr.decode(errors="replace")
    results = {each["stage"]: each for each in map(json.loads, found.stdout.splitlines())}
    assert not case.verified or results["verify"]["counts"]["checked"] > 0
    steps = [json.loads(line) for line in (project.results / "metrics.jsonl").read_bytes().splitlines()]
    return Found(
        keys={stage: results[stage]["key"] for stage in STAGES},
        digests={stage: results[stage]["digest"] for stage in STAGES},
        lora=sha256(project.lora.read_bytes()).hexdigest(),
        losses=[line["loss"] for line in steps],
        grad_norms=[line["grad_norm"] for line in steps],
    )


def all_made(cases: dict[str, Case], root: Path, *, at_once: int) -> dict[str, Found]:
    """Return every case's result, so many processes at a time."""
    roots = [root / str(number) for number in range(len(cases))]
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(cases, pool.map(made, cases.values(), roots), strict=True))


@pytest.fixture(scope="module")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return all_made(CASES, tmp_path_factory.mktemp("one"), at_once=2)


@pytest.fixture(scope="module")
def two_threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return all_made(TWO_THREADS, tmp_path_factory.mktemp("two"), at_once=1)


@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])
def test_surroundings_and_flags_change_no_digest_and_no_byte_of_the_lora(
    one_thread: dict[str, Found], name: str
) -> None:
    assert one_thread[name] == one_thread["plain"]


def test_two_threads_of_the_blas_are_as_reproducible_as_one(two_threads: dict[str, Found]) -> None:
    assert two_threads["otherwise"] == two_threads["plain"]


def test_number_of_threads_is_in_no_key_and_changes_rounding_only(
    one_thread: dict[str, Found], two_threads: dict[str, Found]
) -> None:
    """OpenBLAS adds in another order; measured 1.2e-7 on losses and 7.2e-7 on gradient norms, 2026-11."""
    one, two = one_thread["plain"], two_threads["plain"]
    assert one.digests["validate"] == two.digests["validate"]
    for stage in ("validate", "encode-latents", "encode-text"):
        assert one.keys[stage] == two.keys[stage]
    assert two.losses == pytest.approx(one.losses, rel=1e-6)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=5e-6)
