"""SIGTERM at any of a training's file operations: exit 143, a whole checkpoint, and a resume without a trace.

The signal comes at a chosen call, so that it meets steps, checkpoints being written and pictures being drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.children import Bench
from tests.faults.conftest import Count, Measured
from tests.faults.judge import differences, half_published
from tests.faults.points import Call, calls, chosen
from tests.faults.zygote import Answer, Fault

STEPS = 12
# An average, warm-up, accumulation and dropout: whatever a state can forget.
SETTINGS = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=5",
    "train.gradient_accumulation=2",
    "train.schedule={kind='cosine', warmup_steps=4}",
    "train.ema={decay=0.9}",
)
LIVE = "runs/cat/metrics.jsonl"
STOPPED = 143
STOPS = 50


def train(bench: Bench, fault: Fault) -> Answer:
    return bench.stage("train", fault, *(part for each in SETTINGS for part in ("--set", each)))


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def unbroken(bench: Bench) -> Iterator[list[Call]]:
    """The write-side calls of a training that nothing stops; the bench keeps what it leaves."""
    bench.put(bench.before("train"))
    ran = train(bench, Fault())
    assert ran.code == 0, ran.err
    bench.keep("unbroken")
    return calls(ran.log, "w")


def lines_before(found: list[Call], number: int) -> int:
    """Return how many lines of metrics had been written when call `number` began."""
    live = [call for call in found[: number - 1] if call.operation == "write" and call.path.endswith(LIVE)]
    return len(live)


@pytest.mark.bar("Q12", "Q13")
def test_stopped_training_has_saved_its_last_step_and_resumes_without_a_trace(
    bench: Bench, unbroken: list[Call], count: Count, measured: Measured
) -> None:
    written = [call.number for call in unbroken if 0 < lines_before(unbroken, call.number) < STEPS - 1]
    most = count(1, STOPS)
    good = resumed = late = 0
    bad: list[str] = []
    for at in chosen(written, lambda *_: most, 0):
        bench.put(bench.before("train"))
        stopped = train(bench, Fault(at=at, mode="stop"))
        trajectories = bench.root.glob("store/checkpoints/*/*")
        last = max((int(path.name) for path in trajectories), default=0)
        # A step's line is written while the next one computes: that one is finished and saved, so at most two more.
        over = last - lines_before(unbroken, at)
        late = max(late, over)
        whole = half_published(bench.root, bench.after["unbroken"])
        good += stopped.code == STOPPED and not whole and 0 <= over <= 2
        if stopped.code != STOPPED or whole:
            bad.append(f"{at}: exit {stopped.code}, {whole}, {stopped.err[-500:]}")
        again = train(bench, Fault())
        trace = [each for each in differences(bench.root, bench.after["unbroken"]) if not expected(each, last)]
        resumed += again.code == 0 and not trace
        bad += [f"{at} resumed: exit {again.code} {each}" for each in trace]
    measured("Q13", f"{good} of {most} exit {STOPPED}, whole, saved at most {late} steps after the last line")
    measured("Q12", f"{resumed} of {most} real stops end with the same weights, optimizer, average and lines")
    assert bad == []
    assert (good, resumed) == (most, most)
    assert late <= 2


def expected(difference: str, last: int) -> bool:
    """Whether a stop explains it: its own checkpoint, and previews that are left to be filled in."""
    return f"/{last}" in difference or "preview" in difference
