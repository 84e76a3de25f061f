"""validate: open, decode, hash and bucket every picture; list every fault; write the tables all else starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, Fault, RejectedInput, Stale
from schemas.manifest import Manifest
from schemas.validate import MaskSource
from stages.contract.artifacts import Built, Plan, keyed
from stages.contract.config import is_folder
from stages.contract.digests import digest_of
from stages.contract.job import Job, require_apart
from stages.dataset.pixels import PLAN_VERSION
from stages.dataset.stand_in import folder_digest, require_pictures
from stages.dataset.statistics import Spread, Statistics
from stages.flux2.identity import text_length

if TYPE_CHECKING:
    from stages.dataset.items import Dataset

REPORT = "report.json"


class Validate:
    """Reads a folder of pictures and captions; its roles are what the encoders and training read of them."""

    name = "validate"
    version = 2

    def plan(self, job: Job) -> Plan:
        """Key the settings, the text length that buckets prefer, and every file's path and content."""
        settings = keyed(job.config.validate)
        del settings["dataset"]
        settings.pop("class_dataset", None)
        settings["text_length"] = text_length(job)
        settings["plan_version"] = PLAN_VERSION
        masks = job.config.validate.masks == "files"
        inputs = {"folder": folder_digest(job.dataset, job.digests, masks=masks)}
        folder = class_folder(job)
        if folder is not None:
            # Where it lies decides the paths in the table.
            beside = os.path.relpath(folder.resolve(), job.dataset.resolve())
            inputs["class_folder"] = digest_of(
                "class-folder", [beside, folder_digest(folder, job.digests, masks=False)]
            )
        return Plan(settings, inputs)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Decode what was never decoded before; publish nothing when anything is wrong, unless `skip_bad`."""
        for folder in (job.dataset, class_folder(job)):
            if folder is not None:
                require_pictures(folder, "change [validate] and the model back, or name the pictures' folder there")
        from stages.dataset.decoder import decoders

        decoders(job.config.validate.max_megapixels).start()
        from stages.console.messages import table
        from stages.console.progress import progress
        from stages.dataset.inspections import Look
        from stages.dataset.items import build_items

        with progress(self.name, total=None, quiet=job.flags.quiet) as bar:
            dataset = build_items(
                job.dataset,
                job.config.validate,
                plan.params["text_length"],
                bar.reach,
                class_folder(job),
                look=Look(memory=None if job.flags.force else job.digests),
            )
        if dataset.faults and not job.config.validate.skip_bad:
            raise RejectedInput.of(dataset.faults)
        if all(item.draw.prior for item in dataset.items):
            raise RejectedInput(
                "dataset.empty",
                "no picture is left to train on",
                where=str(job.dataset),
                fix="mend the pictures that were left out",
            )
        if self.plan(job).inputs != plan.inputs:
            raise Stale(
                "dataset.moving",
                "the dataset changed while it was read",
                where=str(job.dataset),
                fix="run the same command again",
            )
        findings = [*dataset.faults, *(Fault(code="dataset.warning", what=line) for line in dataset.warnings)]
        for finding in findings:
            job.warn(finding.what if finding.code == "dataset.warning" else f"left out: {finding.line()}")
        table("Dataset", ("", ""), _shown(dataset.statistics))
        _write_tables(work, dataset)
        report = {"findings": findings, "statistics": dataset.statistics}
        (work / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        return Built(_roles(dataset, job.config.validate.masks), _counts(dataset))

    def foresee(self, job: Job, plan: Plan, work: Path) -> Built:
        """Look at captions, and at the headers of pictures: which of them are damaged inside stays open."""
        for folder in (job.dataset, class_folder(job)):
            if folder is not None:
                require_pictures(folder, "change [validate] and the model back, or name the pictures' folder there")
        from stages.dataset.inspections import Look
        from stages.dataset.items import build_items

        settings = job.config.validate
        dataset = build_items(
            job.dataset,
            settings,
            plan.params["text_length"],
            lambda *_: None,
            class_folder(job),
            look=Look(glance=True, memory=job.digests),
        )
        for fault in dataset.faults:
            job.warn(f"{'will be left out' if settings.skip_bad else 'validate will refuse'}: {fault.line()}")
        _write_tables(work, dataset)
        return Built(_roles(dataset, settings.masks), _counts(dataset))

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """The pictures are what they were."""
        return manifest.counts

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Leave nothing in the run folder: the tables are in the store."""

    def findings(self, folder: Path) -> list[Fault]:
        """Return what the report in an artifact's folder lists: warnings, what was left out. Raises Damaged."""
        path = folder / REPORT
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Report).findings
        except (OSError, *UNREADABLE) as error:
            fix = "run validate again; if that does not help, with --force"
            raise Damaged(
                "report.unreadable", "cannot read the report", where=str(path), why=str(error), fix=fix
            ) from error


def _counts(dataset: Dataset) -> dict[str, int]:
    statistics = dataset.statistics
    return {
        "images": statistics.images,
        "accepted": statistics.accepted,
        "rejected": statistics.rejected,
        "warnings": len(dataset.warnings),
        "items": len(dataset.items),
    }


def _shown(statistics: Statistics) -> list[tuple[str, str]]:
    """Return the statistics as rows of a table."""
    rows: list[tuple[str, str]] = []
    for name, value in msgspec.structs.asdict(statistics).items():
        match value:
            case Spread(minimum=low, median=middle, maximum=high):
                rows.append((name.replace("_", " "), f"{low} .. {middle:g} .. {high}"))
            case dict():
                rows += [(f"bucket {bucket}", str(count)) for bucket, count in value.items()]
            case _:
                rows.append((name.replace("_", " "), str(value)))
    return rows


class _Report(msgspec.Struct):
    findings: list[Fault]


def class_folder(job: Job) -> Path | None:
    """Return the folder of pictures of the class. Raises BadConfig when it is absent or overlaps the dataset."""
    name = job.config.validate.class_dataset
    if name is None:
        return None
    folder, dataset = job.located(name), job.dataset.resolve()
    if not is_folder(folder):
        what = "the folder of class pictures does not exist"
    elif folder.resolve().is_relative_to(dataset) or dataset.is_relative_to(folder.resolve()):
        what = "the folder of class pictures and the dataset lie in each other"
    else:
        require_apart(folder, job.store, job.runs)
        return folder
    fix = f"correct validate.class_dataset in {job.config_path} (it is relative to that file)"
    raise BadConfig("dataset.class_folder", what, where=str(folder), fix=fix)


def _write_tables(work: Path, dataset: Dataset) -> None:
    from schemas.tables import CAPTIONS, DATASET, DRAWS
    from stages.stores.tables import write_table

    rows = [msgspec.structs.asdict(item) for item in dataset.items]
    items = [{name: row[name] for name in DATASET.columns} for row in rows]
    write_table(work / DATASET.name, DATASET, [{**row, "crop": list(row["crop"])} for row in items])
    texts = [{"caption_id": name, "text": text} for name, text in dataset.captions.items()]
    write_table(work / CAPTIONS.name, CAPTIONS, texts)
    if not all(item.draw.plain for item in dataset.items):
        write_table(work / DRAWS.name, DRAWS, [msgspec.structs.asdict(item.draw) for item in dataset.items])


def _roles(dataset: Dataset, masks: MaskSource | None) -> dict[str, str]:
    """Digest what each later stage reads: never a path."""
    pictures = ("item_id", "image_sha256", "bucket_width", "bucket_height", "crop", "background")
    items = [[item.item_id, item.caption_id] for item in dataset.items]
    drawn = [[item.draw.picture, item.draw.times, item.draw.prior] for item in dataset.items]
    plain = [[item.item_id, 1, False] for item in dataset.items]
    covers = [[item.item_id, item.draw.mask_sha256] for item in dataset.items]
    return {
        **({} if masks is None else {"masks": digest_of("masks", [masks, covers])}),
        "pictures": digest_of("pictures", [[getattr(item, name) for name in pictures] for item in dataset.items]),
        "captions": digest_of("captions", list(dataset.captions.items())),
        "items": digest_of("items", items if drawn == plain else [items, drawn]),
    }


STAGE = Validate()
