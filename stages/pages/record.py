"""What a run left behind, read for a page and for nothing else: no lock is kept, no file is written.

A piece that is missing or damaged is a remark on the page, never an error: a training under way has a page as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, Fault
from schemas.manifest import Manifest
from schemas.run import Config
from stages.contract.artifacts import find, read_manifest, read_receipt
from stages.contract.config import load_config
from stages.contract.publish import read_regular
from stages.training.checkpoints import list_checkpoints, trajectory_of
from stages.training.control import who_trains
from stages.training.note import read_note

STAGES = ("validate", "encode-latents", "encode-text", "train", "preview")
PIPELINE = "pipeline.toml"

Line = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """Where things lie; without `config`, the pipeline is looked for where `run` and the ready-made ones are."""

    stores: Sequence[Path]
    config: Path | None = None


@dataclass(frozen=True)
class Training:
    """What the training begun last is made of, the digests of its saved LoRAs by step, and whether it goes on now."""

    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    saved: Mapping[int, str]
    finished: bool
    under_way: bool


class Verified(msgspec.Struct):
    """What `verify` last wrote."""

    depth: str
    checked: int
    findings: list[Fault]
    not_checked: list[str]


@dataclass(frozen=True)
class Record:
    """One run: manifests and artifact folders by stage, metrics lines by step, and what is to be said about gaps.

    `config` is there when the pipeline's file was found, and `base` then is the folder its paths start from.
    """

    name: str
    folder: Path
    stores: Sequence[Path]
    made: Mapping[str, Manifest]
    artifacts: Mapping[str, Path]
    training: Training | None
    metrics: Sequence[Line]
    verified: Verified | None
    config: Config | None
    base: Path
    remarks: Sequence[str]

    @property
    def step(self) -> int:
        """The last step that metrics tell of."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read_record(folder: Path, places: Places) -> Record:
    """Return what the run in `folder` left. Raises BadConfig for a `places.config` that is wrong."""
    remarks: list[str] = []
    config, path = _config(folder, places, remarks)
    made, artifacts = _artifacts(folder, places.stores, remarks)
    metrics, unreadable = read_metrics(folder / results.METRICS)
    if unreadable:
        remarks.append(f"{unreadable} lines of {results.METRICS} cannot be read and are left out.")
    training = _training(folder, places.stores, made.get("train"), remarks)
    record = Record(
        name=folder.name,
        folder=folder,
        stores=places.stores,
        made=made,
        artifacts=artifacts,
        training=training,
        metrics=metrics,
        verified=_verified(folder / results.VERIFY, remarks),
        config=config,
        base=path.absolute().parent,
        remarks=remarks,
    )
    remarks[:0] = _progress(record)
    return record


def read_metrics(path: Path) -> tuple[list[Line], int]:
    """Return the lines of a metrics file by rising step, and how many others there are.

    A last line without its end is being written now, and is neither.
    """
    try:
        data = read_regular(path)
    except OSError:
        return [], 0
    lines: list[Line] = []
    written = data[: data.rfind(b"\n") + 1].splitlines()
    for text in written:
        try:
            line = msgspec.json.decode(text, type=Line)
        except UNREADABLE:
            continue
        step = line.get("step")
        if isinstance(step, int) and step > (lines[-1]["step"] if lines else -1):
            lines.append(line)
    return lines, len(written) - len(lines)


def _config(folder: Path, places: Places, remarks: list[str]) -> tuple[Config | None, Path]:
    """Return the pipeline of a run and its file; one that nobody named is left out when it is wrong, or another's."""
    if places.config is not None:
        return load_config(places.config), places.config
    for path in (folder / PIPELINE, Path("pipelines") / f"{folder.name}.toml"):
        if path.is_file():
            try:
                config = load_config(path)
            except BadConfig as error:
                remarks.append(f"The pipeline cannot be read: {error.faults[0].what} ({error.faults[0].where}).")
                continue
            if (config.run.name or folder.name) == folder.name:
                return config, path
    return None, folder


def _artifacts(
    folder: Path, stores: Sequence[Path], remarks: list[str]
) -> tuple[dict[str, Manifest], dict[str, Path]]:
    made: dict[str, Manifest] = {}
    artifacts: dict[str, Path] = {}
    for stage in STAGES:
        receipt = read_receipt(folder, stage)
        if receipt is None:
            continue
        artifact = find(stage, receipt.key, stores)
        if artifact is None:
            remarks.append(f"What {stage} made is in none of the stores: name its store with --store.")
            continue
        try:
            made[stage] = read_manifest(artifact)
        except Damaged as error:
            remarks.append(f"What {stage} made cannot be read: {error.faults[0].what}.")
        else:
            artifacts[stage] = artifact
    return made, artifacts


def _training(folder: Path, stores: Sequence[Path], train: Manifest | None, remarks: list[str]) -> Training | None:
    """Return the training begun last: that of the note, or, where there is none, the finished one."""
    begun = None
    try:
        begun = read_note(folder)
    except Damaged:
        remarks.append(f"{results.TRAJECTORY} cannot be read.")
    last = begun or train
    if last is None:
        return None
    saved = list_checkpoints(stores, trajectory_of(last.params, last.inputs))
    return Training(
        params=last.params,
        inputs=last.inputs,
        saved={each.step: each.manifest.lora for each in saved if each.manifest.public},
        finished=train is not None and (train.params, train.inputs) == (last.params, last.inputs),
        under_way=who_trains(folder) is not None,
    )


def _verified(path: Path, remarks: list[str]) -> Verified | None:
    try:
        return msgspec.json.decode(read_regular(path), type=Verified)
    except FileNotFoundError:
        return None
    except (OSError, *UNREADABLE):
        remarks.append(f"{results.VERIFY} cannot be read: run verify again.")
        return None


def _progress(record: Record) -> list[str]:
    """Say how far the run has come, where it is not at its end."""
    training = record.training
    if training is None:
        return ["Training has not begun: there is little to show yet."]
    said: list[str] = []
    if training.under_way:
        said.append(f"Training is under way: step {record.step} of {training.params.get('steps')}. Ask again later.")
    elif not training.finished:
        said.append(f"Training is not finished: step {record.step} of {training.params.get('steps')}.")
    if not record.metrics:
        said.append("There are no metrics.")
    if training.finished and record.verified is None:
        said.append("verify has not run: nothing here has been proved.")
    return said
