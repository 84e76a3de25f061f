"""The bench of the fault tests; the frame of bars is `tests.bars`.

`make faults` runs this folder with `--full` and ends with the table; `pytest tests/faults` does so with the samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bars import Count, Measured
from tests.faults.children import Bench, NoShim
from tests.faults.children import bench as made_bench

__all__ = ["Count", "Measured"]


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """Commands whose system calls fail as told; skips where that cannot be had."""
    try:
        with made_bench(library=True) as made:
            yield made
    except NoShim as reason:
        pytest.skip(str(reason))
