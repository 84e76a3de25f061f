"""Sudden death at any file operation of any writing stage: nothing half-published, and the same command heals it.

Dying before call k+1 is dying after call k, so every call but the last is tried once, and writes also half done.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.faults.children import Bench, result
from tests.faults.conftest import Count, Measured
from tests.faults.judge import STAGES, differences, half_published
from tests.faults.points import BEYOND, calls, chosen, distinct
from tests.faults.zygote import Fault

SAMPLE = {"kill": 2, "torn": 1}
# An artifact made at its final place, as if nothing could happen between two writes.
NAIVE = """
import json, os
from hashlib import sha256
from pathlib import Path
arm()
key = Path("store/validate") / ("0" * 64)
if not key.exists():
    key.mkdir(parents=True)
    for name in ("a", "b"):
        (key / name).write_bytes(name.encode() * 1000)
    files = {name: {"sha256": sha256(name.encode() * 1000).hexdigest()} for name in ("a", "b")}
    (key / "manifest.json").write_text(json.dumps({"files": files}))
"""


@dataclass
class Sweep:
    """What a number of deaths came to: moments at which something half was seen, or that did not heal."""

    tried: int = 0
    killed: int = 0
    half: list[str] = field(default_factory=list[str])
    unhealed: list[str] = field(default_factory=list[str])

    def of(self, bad: Sequence[str]) -> str:
        return f"{self.tried - len({each.partition(':')[0] for each in bad})} of {self.tried}"


def deaths(bench: Bench, stage: str, mode: str, count: Count) -> Sweep:
    """Kill `stage` at its calls, one by one; judge what is left, run on to the end of the chain, and compare."""
    found = distinct(calls(bench.ran[stage].log, "w"))
    assert_steady(bench, stage)
    numbers = [call.number for call in found if mode == "kill" or call.operation == "write"]
    if mode == "kill":
        numbers += [numbers[-1] + extra for extra in range(1, BEYOND + 1)]
    sweep = Sweep()
    for number in chosen(numbers, count, SAMPLE[mode]):
        bench.put(bench.before(stage))
        died = bench.stage(stage, Fault(at=number, mode=mode))
        assert died.code in (-signal.SIGKILL, 0), died.err
        sweep.tried += 1
        sweep.killed += died.code != 0
        sweep.half += [f"{number}: {each}" for each in half_published(bench.root, bench.reference)]
        sweep.unhealed += [f"{number}: {each}" for each in unhealed(bench, stage)]
    assert sweep.killed >= sweep.tried - 2 * BEYOND, "the calls were not where the log has them"
    return sweep


def assert_steady(bench: Bench, stage: str) -> None:
    """The command makes the calls again that it made when they were counted: else not every one would be tried.

    On a busy machine a file may grow old enough to be remembered before it is looked at: one time in three is enough.
    """
    counted = len(calls(bench.ran[stage].log, "w"))
    made: list[int] = []
    while not made or (abs(made[-1] - counted) > BEYOND and len(made) < 3):
        bench.put(bench.before(stage))
        made.append(len(calls(bench.stage(stage).log, "w")))
    assert abs(made[-1] - counted) <= BEYOND, made


def unhealed(bench: Bench, stage: str) -> list[str]:
    """Run the plain command again and return in what the project differs from one that never failed.

    After a training previews are drawn too: what it did not get to draw is for them to fill in.
    """
    again = [stage, "preview"] if stage == "train" else [stage]
    for each in again:
        ran = bench.stage(each)
        if ran.code != 0:
            return [f"{each} again: exit {ran.code}, {ran.err}"]
        if result(ran)["digest"] != result(bench.ran[each])["digest"]:
            return [f"{each} again: another digest"]
    return differences(bench.root, bench.after[again[-1]])


def caught(bench: Bench) -> int:
    """Return how many deaths of the naive writer leave something half that its next run does not heal."""
    bad = number = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        bench.put(bench.after["nothing"])
        code = bench.ask([], Fault(at=number, mode="kill"), NAIVE).code
        before = half_published(bench.root, bench.reference)
        assert bench.ask([], script=NAIVE).code == 0
        bad += bool(before) and half_published(bench.root, bench.reference) == before
    return bad


def test_naive_writer_is_caught(bench: Bench) -> None:
    """The harness has teeth: most deaths of a writer that is not careful leave a half artifact for ever."""
    assert caught(bench) >= 8


@pytest.mark.bar("Q1", "Q2")
@pytest.mark.parametrize("mode", ["kill", "torn"])
@pytest.mark.parametrize("stage", STAGES)
def test_death_at_any_moment_leaves_nothing_half_and_the_same_command_heals(
    bench: Bench, stage: str, mode: str, count: Count, measured: Measured
) -> None:
    sweep = deaths(bench, stage, mode, count)
    measured("Q1", f"{stage}, {mode}: nothing half-published at {sweep.of(sweep.half)}")
    measured("Q2", f"{stage}, {mode}: the reference again, no litter, at {sweep.of(sweep.unhealed)}")
    assert sweep.half == []
    assert sweep.unhealed == []
