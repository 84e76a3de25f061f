"""What an inspection notes: remedies for the command line that was given."""

from __future__ import annotations

from pathlib import Path

from schemas.errors import Damaged, Stale
from schemas.run import Config
from schemas.tables import DATASET
from schemas.validate import Validate
from stages.contract.job import Job
from stages.inspection.depth import Depth, depth_of
from stages.inspection.findings import Inspection
from stages.stores.tables import read_table


def test_remedy_of_what_the_store_finds_repeats_the_command_line(tmp_path: Path) -> None:
    config = Config(validate=Validate(dataset="."))
    job = Job(config, Path("my cat.toml"), tmp_path, tmp_path, given=("--set", "train.rank=4"))
    inspection = Inspection(job, depth_of(job.flags))
    with inspection.noting():
        read_table(tmp_path / "dataset.parquet", DATASET)
    [(kind, fault)] = inspection.errors
    assert kind is Damaged
    assert fault.fix == "flux2-lora validate --config 'my cat.toml' --set train.rank=4 --force"


def test_fault_that_several_looks_meet_is_told_once(tmp_path: Path) -> None:
    inspection = Inspection(
        Job(Config(validate=Validate(dataset=".")), Path("cat.toml"), tmp_path, tmp_path), Depth()
    )
    for stage in ("train", "preview", "train"):
        inspection.error(Stale, "chain.broken", f"{stage} is old", tmp_path, "run it")
    with inspection.noting():
        raise Damaged("file.changed", "a file is damaged")
    assert [fault.what for _, fault in inspection.sorted_errors()] == [
        "a file is damaged",
        "train is old",
        "preview is old",
    ]
