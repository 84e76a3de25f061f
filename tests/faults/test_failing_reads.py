"""A read that fails, gives half of what it could, or ends early: an error, or the right result.

An error is one of ours: exit 2 to 5 or 7, by what could not be read, and lines with a code and a remedy.
Nothing wrong is remembered: the same command gives the right result when the disk is well again.
"""

from __future__ import annotations

import errno

import pytest

from tests.faults.children import Bench
from tests.faults.conftest import Count, Measured
from tests.faults.judge import STAGES
from tests.faults.points import calls, chosen, distinct
from tests.faults.test_deaths import unhealed
from tests.faults.test_failures import RESOURCES, in_turn, wrong
from tests.faults.zygote import Fault

READING = (2, 3, 4, 5, RESOURCES)
READ_FAULTS = {"device fails": "errno", "half": "short", "ends": "ended"}
# A training's reads, by far the most, are tried in shares: so that several processes can.
SHARES = {"train": 6, "preview": 3}
CASES = [(stage, share) for stage in STAGES for share in range(SHARES.get(stage, 1))]


@pytest.mark.bar("Q5")
@pytest.mark.parametrize("name", READ_FAULTS)
@pytest.mark.parametrize(("stage", "share"), CASES)
def test_failing_read_is_an_error_or_harmless(
    bench: Bench, stage: str, share: int, name: str, count: Count, measured: Measured
) -> None:
    in_turn(stage, name, list(READ_FAULTS), count)
    points = [call.number for call in distinct(calls(bench.ran[stage].log, "r")) if call.operation == "read"]
    bad: list[str] = []
    shares = SHARES.get(stage, 1)
    tried, ended = chosen(points, count, shares)[share::shares], dict[int, int]()
    for at in tried:
        bench.put(bench.before(stage))
        fault = Fault(side="read", at=at, mode=READ_FAULTS[name], errno=errno.EIO, operation="read")
        ran = bench.stage(stage, fault)
        ended[ran.code] = ended.get(ran.code, 0) + 1
        bad += [f"{at}: {each}" for each in wrong(bench, stage, ran, READING)]
        if ran.code != 0:
            bad += [f"{at}: {each}" for each in unhealed(bench, stage)]
    bads = len({each.partition(":")[0] for each in bad})
    part = f", share {share + 1}" if shares > 1 else ""
    measured("Q5", f"{stage}{part}, {name}: {len(tried) - bads} of {len(tried)} right (exit codes {ended})")
    assert bad == []
