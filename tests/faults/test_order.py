"""Nothing is shown before it is synced, and nothing is called done before its folder is."""

from __future__ import annotations

import pytest

from tests.faults.children import Bench
from tests.faults.conftest import Measured
from tests.faults.judge import STAGES
from tests.faults.order import violations
from tests.faults.points import calls
from tests.faults.test_deaths import NAIVE

NO_SYNC = "from stages.contract import publish; publish._sync_descriptor = lambda _: None"
NO_FOLDERS = """
from stages.contract import publish
sync = publish.sync
publish.sync = lambda path: None if path.is_dir() else sync(path)
"""


@pytest.mark.bar("Q6")
@pytest.mark.parametrize("stage", STAGES)
def test_stage_syncs_before_it_publishes(bench: Bench, stage: str, measured: Measured) -> None:
    log = bench.ran[stage].log
    operations = [call.operation for call in calls(log, "w")]
    found = violations(log, str(bench.root))
    syncs, renames = operations.count("fsync"), operations.count("rename")
    measured("Q6", f"{stage}: {len(found)} violations in {syncs} syncs and {renames} renames")
    assert found == []
    assert syncs > renames > 0


@pytest.mark.parametrize(("script", "said"), [(NO_SYNC, "shown before"), (NO_FOLDERS, "points to what is not")])
def test_writer_that_leaves_out_a_sync_is_caught(bench: Bench, script: str, said: str) -> None:
    bench.put(bench.before("validate"))
    ran = bench.stage("validate", script=script)
    assert ran.code == 0
    assert any(said in each for each in violations(ran.log, str(bench.root)))


def test_naive_writer_is_caught(bench: Bench) -> None:
    bench.put(bench.after["nothing"])
    found = violations(bench.ask([], script=NAIVE).log, str(bench.root))
    assert len([each for each in found if "in place" in each]) >= 3
