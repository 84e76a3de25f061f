"""Deaths where no system call can be failed: the same sweep with the shim in Python, on any system."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.children import Bench, bench
from tests.faults.conftest import Count, Measured
from tests.faults.judge import STAGES
from tests.faults.order import violations
from tests.faults.test_deaths import caught, deaths

TRIED = 40


@pytest.fixture(scope="module")
def python_bench() -> Iterator[Bench]:
    with bench(library=False) as made:
        yield made


def test_naive_writer_is_caught(python_bench: Bench) -> None:
    assert caught(python_bench) >= 8


@pytest.mark.bar("Q1", "Q2")
@pytest.mark.parametrize("stage", STAGES)
def test_death_at_any_moment_leaves_nothing_half(
    python_bench: Bench, stage: str, count: Count, measured: Measured
) -> None:
    most = count(1, TRIED)
    sweep = deaths(python_bench, stage, "torn" if stage == "encode-text" else "kill", lambda *_: most)
    measured("Q1", f"{stage}, in Python: nothing half-published at {sweep.of(sweep.half)}")
    measured("Q2", f"{stage}, in Python: the reference again, no litter, at {sweep.of(sweep.unhealed)}")
    assert sweep.half == []
    assert sweep.unhealed == []


@pytest.mark.bar("Q6")
def test_stages_sync_before_they_publish(python_bench: Bench, measured: Measured) -> None:
    found = [each for stage in STAGES for each in violations(python_bench.ran[stage].log, str(python_bench.root))]
    measured("Q6", f"all stages, in Python: {len(found)} violations")
    assert found == []
