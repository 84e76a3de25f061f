"""A whole run, inspected from end to end: the one order in which everything is looked at."""

from __future__ import annotations

from stages.contract.job import Job
from stages.inspection.depth import Depth
from stages.inspection.files import check_files, check_stores
from stages.inspection.findings import Inspection
from stages.inspection.lineage import chain_of
from stages.inspection.records import check_records
from stages.inspection.replay import check_steps
from stages.inspection.sources import check_dataset, check_model, check_pictures_drawn
from stages.inspection.tables import check_tables
from stages.inspection.training import check_training


def inspect(job: Job, depth: Depth) -> Inspection:
    """Return all that is wrong with what the run's receipts name, as far as `depth` looks. Writes nothing."""
    inspection = Inspection(job, depth)
    chain = chain_of(inspection)
    for stage, artifact in chain.items():
        check_files(inspection, stage, artifact)
    check_tables(inspection, chain)
    check_records(inspection, chain)
    check_training(inspection, chain)
    check_pictures_drawn(inspection, chain)
    check_dataset(inspection, chain)
    check_model(inspection, chain)
    check_stores(inspection)
    check_steps(inspection, chain)
    return inspection
