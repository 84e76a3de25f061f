"""What the work ahead needs: memory at the peak of each stage, and bytes on disk, from shapes alone.

Peaks are those of `stages/training/memory.py`. Nothing is loaded; of a model that is not on this machine the
published dimensions are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from schemas.base import Strict
from schemas.quantize import Quantize
from stages.contract.digests import is_unknown
from stages.contract.job import Job
from stages.dataset.buckets import PATCH_PX
from stages.flux2.backend import Backend
from stages.flux2.folder import ModelFiles
from stages.flux2.identity import drawing_model_of, model_of
from stages.flux2.load import text_encoder_formats, transformer_formats
from stages.flux2.packing import packed_modules
from stages.flux2.shapes import text_encoder_shapes, transformer_shapes
from stages.outlook.chain import Ahead, Outlook
from stages.stores.fragments import RECORD_BYTES, stored_bytes
from stages.training.memory import (
    QUANTIZED_BY_LOSS,
    SMALLER_PX,
    TOLERANCE,
    Demand,
    Device,
    Packed,
    Remedy,
    estimate,
    latents_peak,
    preview_peak,
    remedies,
    sizes,
    text_peak,
)
from stages.training.preflight import demand_of, needs

Peak = Callable[[Any], int]
# Beside the records of an artifact: its manifest and tables.
ARTIFACT_BYTES = 32_768
RGB = 3


class Need(Strict, frozen=True):
    """Of one stage's work: the peak of memory, and bytes it will add to the store and to the run folder.

    `remedy` are settings that would make the peak fit, as TOML, where it does not; empty where nothing would.
    """

    peak_bytes: int | None = None
    store_bytes: int = 0
    run_bytes: int = 0
    fits: bool | None = None
    remedy: dict[str, str] = msgspec.field(default_factory=dict[str, str])


def to_do(stage: str, outlook: Outlook) -> int:
    """Return how much a stage has to do, in pictures, records or steps."""
    counts = outlook.counts
    if outlook.done:
        return 0
    match stage:
        case "validate":
            return counts["images"]
        case "train":
            return counts["steps"] - counts["resumed_from"]
        case "preview":
            return counts["rendered"]
        case _:
            return counts["encoded"]


class Needs:
    """The needs of the stages ahead of one job on one machine, which may fill `limit_bytes`."""

    def __init__(self, job: Job, ahead: Ahead, backend: Backend, limit_bytes: int | None) -> None:
        self._job = job
        self._ahead = ahead
        self._device: Device = backend.device
        self._limit = limit_bytes
        self._model = model_of(job)
        self._parts = sizes(self._model.variant, job.config.train, backend.compute_dtype)

    def of(self, stage: str) -> Need:
        """Return what the work of `stage` needs; nothing where its artifact is whole."""
        if self._ahead[stage].done:
            return Need()
        match stage:
            case "validate":
                need = Need()
            case "encode-latents":
                need = self._latents()
            case "encode-text":
                need = self._text()
            case "train":
                need = self._train()
            case _:
                need = self._preview()
        if not to_do(stage, self._ahead[stage]):
            # No model is loaded to put together what is there.
            need = Need(store_bytes=need.store_bytes, run_bytes=need.run_bytes)
        return msgspec.structs.replace(need, store_bytes=need.store_bytes + ARTIFACT_BYTES)

    def _need(self, peak_bytes: int, remedy: Callable[[int], Remedy | None], disk: tuple[int, int]) -> Need:
        fits, settings = None, {}
        if self._limit is not None:
            fits = peak_bytes <= self._limit
            found = None if fits else remedy(self._limit)
            settings = {} if found is None else found[0]
        return Need(peak_bytes=peak_bytes, store_bytes=disk[0], run_bytes=disk[1], fits=fits, remedy=settings)

    def _latents(self) -> Need:
        config, pixels = self._model.variant.autoencoder, self.largest_px
        rows = _missing(_rows(self._ahead["encode-latents"].folder, "latents"))
        disk = sum(stored_bytes(row["channels"] * row["height"] * row["width"], row["dtype"]) for row in rows)

        def remedy(limit: int) -> Remedy | None:
            smaller = (side for side in SMALLER_PX if side**2 < pixels)
            options = (
                ({"validate.resolutions": f"[{side}]"}, latents_peak(config, self._device, side**2))
                for side in smaller
            )
            return _first(options, limit)

        return self._need(latents_peak(config, self._device, pixels), remedy, (disk, 0))

    def _text(self) -> Need:
        config, quantize = self._model.variant.text_encoder, self._job.config.encode_text.quantize
        shapes = text_encoder_shapes(config)
        packed = (
            text_encoder_formats(self._model, quantize)
            if self._model.text_encoder
            else packed_modules(shapes, quantize)
        )
        rows = _missing(_rows(self._ahead["encode-text"].folder, "text"))
        disk = sum(stored_bytes(row["length"] * row["width"], row["dtype"]) for row in rows)

        def remedy(limit: int) -> Remedy | None:
            modes = ((mode, packed_modules(shapes, mode)) for mode in QUANTIZED_BY_LOSS)
            options = (
                ({"encode_text.quantize": f'"{mode}"'}, text_peak(config, each, self._device)) for mode, each in modes
            )
            return _first(options, limit)

        return self._need(text_peak(config, packed, self._device), remedy, (disk, 0))

    def demand(self) -> Demand:
        """Return what a step of the training needs."""
        tokens = self.largest_px // PATCH_PX**2
        packed = _transformer_formats(self._model, self._job.config.model.quantize)
        return demand_of(self._model.variant, self._job.config.train, self._device, self._parts, (tokens, packed))

    def _train(self) -> Need:
        job, demand = self._job, self.demand()
        settings, start = job.config.preview, self._ahead["train"].counts["resumed_from"]
        step, drawing = estimate(demand), 0
        store, run = needs(job.config.train, self._parts, start)
        shown = drawn_in_training(job, self._ahead)
        if shown:
            # Drawn with all that trains in memory.
            drawing = (
                preview_peak(self._model.variant, demand.packed, self._device, settings.size) + self._parts.state
            )
            store, run = store + shown * self._picture_bytes(), run + 2 * shown * self._picture_bytes()

        def remedy(limit: int) -> Remedy | None:
            found = remedies(demand, limit)[0][0] if step > limit and remedies(demand, limit)[0] else ({}, step)
            if found[1] > limit:
                return None
            without = {"preview.during_training": "false"} if drawing > limit else {}
            return {**found[0], **without}, found[1]

        return self._need(max(step, drawing), remedy, (store, run))

    def _preview(self) -> Need:
        job, variant = self._job, drawing_model_of(self._job).variant
        size = job.config.preview.size
        packed = _transformer_formats(drawing_model_of(job), job.config.model.quantize)
        shapes = transformer_shapes(variant.transformer)

        def remedy(limit: int) -> Remedy | None:
            def options() -> Iterator[Remedy]:
                for mode in QUANTIZED_BY_LOSS:
                    peak = preview_peak(variant, packed_modules(shapes, mode), self._device, size)
                    yield {"model.quantize": f'"{mode}"'}, peak
                for side in SMALLER_PX:
                    if side < size:
                        yield {"preview.size": str(side)}, preview_peak(variant, packed, self._device, side)

            return _first(options(), limit)

        counts, several = self._ahead["preview"].counts, len(set(job.config.preview.prompts)) > 1
        # Every picture once more on the sheet of all, and where there are several on the grid of its step.
        pages = counts["images"] * (2 if several else 1) * self._picture_bytes()
        pictures = counts["rendered"] * self._picture_bytes() + pages
        disk = (pictures, pictures)
        return self._need(preview_peak(variant, packed, self._device, size), remedy, disk)

    def _picture_bytes(self) -> int:
        """Return what a picture takes at most: PNG makes noise no larger than its pixels, and a little."""
        return RGB * self._job.config.preview.size**2 + RECORD_BYTES

    @cached_property
    def largest_px(self) -> int:
        """The pixels of the largest bucket."""
        from schemas.tables import DATASET
        from stages.stores.tables import read_table

        rows = read_table(self._ahead["validate"].folder / DATASET.name, DATASET)
        return max((row["bucket_width"] * row["bucket_height"] for row in rows), default=0)


def drawn_in_training(job: Job, ahead: Ahead) -> int:
    """Return how many pictures training will draw at its checkpoints."""
    settings, train = job.config.preview, job.config.train
    if not to_do("train", ahead["train"]) or not settings.during_training or settings.distilled is not None:
        return 0
    start = ahead["train"].counts["resumed_from"]
    checkpoints = train.steps // train.checkpoint_every - start // train.checkpoint_every
    checkpoints += train.steps % train.checkpoint_every > 0
    return (checkpoints + (start == 0)) * len(settings.prompts)


def surely_too_much(need: Need, limit_bytes: int | None) -> bool:
    """Return whether the peak exceeds what there is even where the estimate is as far too large as it can be."""
    return limit_bytes is not None and (need.peak_bytes or 0) * (1 - TOLERANCE) > limit_bytes


def _first(options: Iterator[Remedy], limit: int) -> Remedy | None:
    return next((each for each in options if each[1] <= limit), None)


def _transformer_formats(model: ModelFiles, quantize: Quantize) -> Packed:
    if model.transformer:
        return transformer_formats(model, quantize)
    return packed_modules(transformer_shapes(model.variant.transformer), quantize)


def _rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    from schemas.tables import EMBEDDING_INDEX, LATENT_INDEX, MASK_INDEX
    from stages.stores.tables import read_table

    tables = (EMBEDDING_INDEX,) if kind == "text" else (LATENT_INDEX, MASK_INDEX)
    return [
        row for table in tables if (folder / table.name).is_file() for row in read_table(folder / table.name, table)
    ]


def _missing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of records that no store has, each record once."""
    key = "embedding_key" if rows and "embedding_key" in rows[0] else "latent_key"
    return list({row[key]: row for row in rows if is_unknown(row["sha256"])}.values())
