"""How long the work ahead will take, as far as this machine has done its like: never a guess.

Measured are the artifacts in our own stores that were made on this system, the training's own metrics, and what
`bench` printed.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, Stale
from schemas.manifest import Manifest
from stages.contract.artifacts import MANIFEST, read_manifest
from stages.contract.job import Job
from stages.contract.publish import read_regular
from stages.flux2.identity import model_of
from stages.outlook.chain import Ahead
from stages.outlook.needs import drawn_in_training, to_do
from stages.training.checkpoints import newest, trajectory_of

# What the time of a record, a picture or a step depends on: of the settings, and of the inputs.
LIKE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "validate": ((), ()),
    "encode-latents": (("dtype",), ("autoencoder",)),
    "encode-text": (("quantize", "length"), ("text_encoder",)),
    "train": (
        (
            "batch_size",
            "gradient_accumulation",
            "gradient_checkpointing",
            "compile",
            "rank",
            "targets",
            "adapter",
            "optimizer",
            "preservation",
            "quantize",
        ),
        ("transformer",),
    ),
    "preview": (("size", "steps", "guidance", "quantize"), ("transformer", "decoder")),
}
DONE = {"validate": "images", "encode-latents": "encoded", "encode-text": "encoded", "preview": "rendered"}


class _Measured(msgspec.Struct):
    """A row of what `bench --json` prints, as far as it is read here."""

    model: str
    size_px: int
    batch_size: int
    quantize: str
    gradient_checkpointing: bool
    compile: bool
    milliseconds: float


class _Bench(msgspec.Struct):
    measured: list[_Measured]


class Timing:
    """Seconds of the stages ahead of one job."""

    def __init__(self, job: Job, ahead: Ahead, area_px: int, bench: Sequence[Path]) -> None:
        self._job = job
        self._ahead = ahead
        self._area = area_px
        self._bench = [row for path in bench for row in read_bench(path)]

    def seconds(self, stage: str) -> float | None:
        """Return how long the work of `stage` will take; None where nothing like it was done here."""
        count = to_do(stage, self._ahead[stage])
        if not count:
            return 0.0
        if stage != "train":
            rate = self._rate(stage)
            return None if rate is None else rate * count
        step, pictures = self._step(), drawn_in_training(self._job, self._ahead)
        if step is None or not pictures:
            return None if step is None else step * count
        drawing = self._rate("preview")
        return None if drawing is None else step * count + drawing * pictures

    def _rate(self, stage: str) -> float | None:
        """Return seconds per record or picture of the artifact of most of them that is like what is ahead."""
        done = [
            (each.counts[DONE[stage]], float(each.provenance["seconds"]))
            for each, _ in self._like(stage)
            if each.counts.get(DONE[stage]) and "seconds" in each.provenance
        ]
        if not done:
            return None
        count, seconds = max(done)
        return seconds / count

    def _step(self) -> float | None:
        """Return seconds per step: of this training, else of one like it, else as `bench` measured."""
        train, settings = self._ahead["train"], self._job.config.train
        own = newest(
            self._job.stores, trajectory_of(train.plan.params, train.plan.inputs), settings.steps, self._job.warn
        )
        if own is not None and (found := _mean(own.metrics())) is not None:
            return found
        for manifest, folder in self._like("train"):
            if self._same_sizes(manifest) and (found := _mean(_metrics(folder))) is not None:
                return found
        model = model_of(self._job).variant.name
        rows = [
            row
            for row in self._bench
            if (row.model, row.quantize, row.batch_size)
            == (model, self._job.config.model.quantize, settings.batch_size)
            and (row.gradient_checkpointing, row.compile) == (settings.gradient_checkpointing, settings.compile)
            and row.size_px**2 >= self._area
        ]
        smallest = min(rows, key=lambda row: row.size_px, default=None)
        return None if smallest is None else smallest.milliseconds / 1000 * settings.gradient_accumulation

    def _like(self, stage: str) -> Iterator[tuple[Manifest, Path]]:
        """Yield the artifacts of a stage that were made on this system with what decides how long it takes."""
        plan, (params, inputs) = self._ahead[stage].plan, LIKE[stage]
        for path in sorted((self._job.store / stage).glob(f"*/{MANIFEST}")):
            try:
                manifest = read_manifest(path.parent)
            except (Damaged, Stale):
                continue
            here = manifest.provenance.get("platform") == platform.platform(terse=True)
            now = msgspec.to_builtins(plan.params)
            same = all(manifest.params.get(name) == now.get(name) for name in params)
            if here and same and all(manifest.inputs.get(name) == plan.inputs.get(name) for name in inputs):
                yield manifest, path.parent

    def _same_sizes(self, train: Manifest) -> bool:
        """Return whether a training saw pictures of the sizes that are asked for now."""
        for path in sorted((self._job.store / "validate").glob(f"*/{MANIFEST}")):
            try:
                manifest = read_manifest(path.parent)
            except (Damaged, Stale):
                continue
            if manifest.roles.get("items") == train.inputs["items"]:
                return manifest.params["resolutions"] == list(self._job.config.validate.resolutions)
        return False


def read_bench(path: Path) -> list[_Measured]:
    """Return the rows of a file that `bench --json` was sent to. Raises BadConfig when it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Bench).measured
    except (OSError, *UNREADABLE) as error:
        raise BadConfig(
            "plan.bench",
            "not what bench --json prints",
            where=str(path),
            why=str(error),
            fix=f"flux2-lora bench MODEL --json > {path.name}",
        ) from error


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        return [msgspec.json.decode(line) for line in read_regular(folder / results.METRICS).splitlines()]
    except (OSError, *UNREADABLE):
        return []


def _mean(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean seconds of the later half of the steps: the first ones start slowly."""
    found = [line["seconds"] for line in lines if line.get("seconds") is not None]
    return fmean(found[len(found) // 2 :]) if found else None
