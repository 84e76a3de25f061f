"""What must not matter does not: surroundings, flags and folders give the same LoRA; the dataset stays as it was."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from tests.faults.children import Bench, result
from tests.faults.conftest import Count, Measured
from tests.faults.judge import STAGES
from tests.faults.zygote import Fault
from tests.stages.project import Project
from tests.stages.test_indifference import QUIET, TWO, Case, Found, all_made

# One difference each. The number of threads changes rounding, so that two threads are compared with two.
CASES = {
    "saving": Case(sets=(*QUIET, "train.checkpoint_every=1")),
    "preview": Case(sets=("train.checkpoint_every=3",)),
    "verify": Case(verified=True),
    "threads": Case({**TWO, "PYTHONHASHSEED": "1"}),
    "current folder": Case(inside=True),
    "path": Case(folder="an other/and much deeper/place"),
    "locale": Case({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}),
    "hash seed": Case({"PYTHONHASHSEED": "4711"}),
}
PLAIN = {"plain": Case(), "plain, two threads": Case(TWO)}


@pytest.mark.bar("Q24")
def test_nothing_around_a_training_changes_it(tmp_path: Path, count: Count, measured: Measured) -> None:
    if count(0, 1) == 0:
        pytest.skip("tests/stages/test_indifference.py holds it in the plain run, several differences at once")
    made: dict[str, Found] = all_made({**PLAIN, **CASES}, tmp_path, at_once=2)
    expected = {name: made["plain, two threads" if name == "threads" else "plain"].lora for name in CASES}
    same = [name for name in CASES if made[name].lora == expected[name]]
    measured("Q24", f"{len(same)} of {len(CASES)} the same LoRA (two threads are compared with two)")
    assert same == list(CASES)


@pytest.mark.bar("Q25")
def test_two_folders_give_the_same_artifacts(bench: Bench, measured: Measured) -> None:
    bench.put(bench.after["nothing"])
    elsewhere = bench.project.copy(bench.folder / "another place" / "project").root
    found = {}
    for stage in STAGES:
        ran = bench.ask(Project(elsewhere).arguments(stage))
        assert ran.code == 0, ran.err
        found[stage] = {name: result(ran)[name] for name in ("key", "digest")}
    expected = {stage: {name: result(bench.ran[stage])[name] for name in ("key", "digest")} for stage in STAGES}
    same = [stage for stage in STAGES if found[stage] == expected[stage]]
    measured("Q25", f"{len(same)} of {len(STAGES)} stages give the same keys and digests in another folder")
    assert found == expected
    lora = "runs/cat/cat.safetensors"
    assert (elsewhere / lora).read_bytes() == (bench.reference / lora).read_bytes()


@pytest.mark.bar("Q26")
def test_dataset_folder_is_the_same_before_and_after(bench: Bench, count: Count, measured: Measured) -> None:
    bench.put(bench.after["nothing"])
    before = listed(bench.project.pictures)
    tries = count(2, 20)
    for number in range(tries):
        for stage in STAGES:
            bench.stage(stage, Fault(at=5 + 7 * number, mode=("torn", "errno")[number % 2], errno=5))
            assert bench.stage(stage).code == 0
        bench.stage("verify")
        bench.stage("validate", Fault(), "--force")
    after = listed(bench.project.pictures)
    measured("Q26", f"{len(before)} files and folders unchanged after {tries} chains with a fault in every stage")
    assert after == before


def listed(folder: Path) -> dict[str, tuple[str, int, int, int]]:
    """Return content, mode, times and inode of everything there."""
    found: dict[str, tuple[str, int, int, int]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        stat = os.lstat(path)
        content = sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(folder).as_posix()] = (content, stat.st_mode, stat.st_mtime_ns, stat.st_ino)
    return found
