"""An up-to-date chain changes nothing on disk, and is quick about it."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.children import Bench
from tests.faults.conftest import Count, Measured
from tests.faults.judge import STAGES
from tests.faults.points import calls
from tests.stages.project import draw, edit

CHANGING = ("write", "truncate", "rename", "mkdir", "unlink", "link", "fsync")
# Digests of files younger than two seconds are not remembered yet, so the first looks may write them down.
SETTLED_AFTER = 30
SAMPLES = 1000


def changes(bench: Bench) -> list[str]:
    """Ask every stage once and return what any of them changed."""
    found: list[str] = []
    for stage in STAGES:
        ran = bench.stage(stage)
        assert ran.code == 0, ran.err
        assert '"up to date"' in ran.out
        found += [
            f"{stage}: {call.operation} {call.path}"
            for call in calls(ran.log, "w")
            if call.operation in CHANGING and call.result >= 0
        ]
    return found


def settled(bench: Bench) -> tuple[list[str], int]:
    """Ask until nothing is written any more; return what the last round wrote, and how many it took."""
    written: list[str] = []
    for rounds in range(SETTLED_AFTER):
        written = changes(bench)
        if not written:
            return [], rounds
    return written, SETTLED_AFTER


@pytest.mark.bar("Q15")
def test_up_to_date_chain_writes_nothing(bench: Bench, measured: Measured) -> None:
    bench.put(bench.reference)
    written, rounds = settled(bench)
    measured("Q15", f"{len(written)} writes, once the digests were remembered (after {rounds} rounds)")
    assert written == []


@pytest.mark.bar("Q15")
def test_up_to_date_chain_of_many_samples_is_quick(bench: Bench, count: Count, measured: Measured) -> None:
    samples = count(20, SAMPLES)
    bench.put(bench.after["nothing"])
    shutil.rmtree(bench.project.pictures)
    for number in range(samples):
        color = (number % 256, number // 256, 99)
        draw(bench.project.pictures, f"{number:06}", color, f"a [trigger] number {number % 10}")
    edit(bench.project.config, "resolutions = [32, 48]", "resolutions = [32]")
    for stage in STAGES:
        ran = bench.stage(stage)
        assert ran.code == 0, ran.err
    written, _ = settled(bench)
    again = [bench.stage(stage) for stage in STAGES]
    seconds = sum(each.seconds for each in again)
    measured(
        "Q15", f"{samples} samples: {seconds:.2f} s for the five stages, {len(written)} writes (no interpreters)"
    )
    assert written == []
    assert seconds <= 2.0
