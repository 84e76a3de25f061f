"""Death while old checkpoints make room for new ones: the newest that was published is there and whole, always."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from tests.faults.children import NO_FAULT, Bench, result
from tests.faults.conftest import Count, Measured
from tests.faults.judge import differences
from tests.faults.points import BEYOND, Call, calls, chosen, distinct
from tests.faults.zygote import Answer, Fault

# Every step is saved and takes the place of the one before; pictures are left to preview.
SETTINGS = (
    "train.steps=4",
    "train.checkpoint_every=1",
    "train.rotation={keep_last=1, keep_best=false}",
    "preview.during_training=false",
)
CHECKPOINT = re.compile(r"/store/checkpoints/[0-9a-f]+/([0-9]+)")


def train(bench: Bench, fault: Fault = NO_FAULT) -> Answer:
    return bench.stage("train", fault, *(part for each in SETTINGS for part in ("--set", each)))


def published(found: Sequence[Call]) -> list[int]:
    """Return the steps whose checkpoints these calls put in their place."""
    moved = [CHECKPOINT.search(call.other) for call in found if call.operation == "rename" and call.result >= 0]
    return [int(each[1]) for each in moved if each is not None and each.end() == len(each.string)]


def whole(store: Path) -> list[int]:
    """Return the steps of the checkpoints in a store that are what their manifests say; there may be no others."""
    steps: list[int] = []
    for manifest in store.glob("checkpoints/*/*/manifest.json"):
        for name, record in json.loads(manifest.read_bytes())["files"].items():
            assert sha256((manifest.parent / name).read_bytes()).hexdigest() == record["sha256"]
        steps.append(int(manifest.parent.name))
    assert len(steps) == len(list(store.glob("checkpoints/*/*")))
    return sorted(steps)


@pytest.mark.bar("Q1", "Q2")
def test_newest_checkpoint_survives_a_death_at_any_moment_of_rotation(
    bench: Bench, count: Count, measured: Measured
) -> None:
    bench.put(bench.before("train"))
    unbroken = train(bench)
    assert unbroken.code == 0, unbroken.err
    bench.keep("rotated")
    assert whole(bench.root / "store") == [4]
    found = calls(unbroken.log, "w")
    first = next(call.number for call in found if published([call]))
    numbers = [call.number for call in distinct(found) if call.number >= first]
    numbers += [numbers[-1] + extra for extra in range(1, BEYOND + 1)]
    bad: list[str] = []
    tried = chosen(numbers, count, 3)
    for at in tried:
        bench.put(bench.before("train"))
        died = train(bench, Fault(at=at, mode="kill"))
        assert died.code in (-signal.SIGKILL, 0), died.err
        newest = max(published(calls(died.log, "w")), default=0)
        left = whole(bench.root / "store")
        if max(left, default=0) != newest:
            bad.append(f"{at}: step {newest} was saved, {left} are there")
        again = train(bench)
        if again.code != 0 or result(again)["digest"] != result(unbroken)["digest"]:
            bad.append(f"{at}: exit {again.code} {again.err}")
        bad += [f"{at}: {each}" for each in differences(bench.root, bench.after["rotated"])]
    good = len(tried) - len({each.partition(":")[0] for each in bad})
    measured("Q1", f"train, rotation: the newest checkpoint is whole, and the run heals, at {good} of {len(tried)}")
    measured("Q2", f"train, rotation: the reference again, nothing too much, at {good} of {len(tried)}")
    assert bad == []
