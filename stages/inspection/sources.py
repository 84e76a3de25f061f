"""What a run was made from: the dataset folder and the model, hashed again; in depth, the dataset validated again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, NoResources, StageError, Stale, Stopped
from stages.contract.artifacts import keyed
from stages.contract.digests import canonical_json
from stages.inspection.findings import Artifact, Chain, Inspection, content

RUN_AGAIN = "run all stages again"


def check_dataset(inspection: Inspection, chain: Chain) -> None:
    """Hash the pictures and masks of the dataset again; in depth decode them and read their captions too."""
    if "validate" not in chain:
        return
    if inspection.depth.quick:
        inspection.leave_out("the pictures of the dataset (left out by --quick)")
        return
    from schemas.tables import DATASET
    from stages.dataset.draws import read_draws
    from stages.dataset.stand_in import stands_in
    from stages.stores.tables import read_table

    manifest, folder = chain["validate"]
    try:
        items = read_table(folder / DATASET.name, DATASET)
        draws = read_draws(manifest, folder, items)
        dataset = inspection.job.dataset
    except (Damaged, BadConfig) as error:
        inspection.leave_out(f"the pictures of the dataset ({error.faults[0].what})")
        return
    if stands_in(dataset):
        inspection.leave_out("the pictures of the dataset (they are elsewhere: this came as a bundle)")
        return
    files = {(row["path"], row["image_sha256"], "picture") for row in items}
    files |= {(draw.mask_path, draw.mask_sha256, "mask") for draw in draws.values() if draw.mask_path}
    for path, sha256, kind in sorted(files):
        if not inspection.depth.reads(path):
            continue
        inspection.checked += 1
        if not (dataset / path).is_file() or content(dataset / path) != sha256:
            what = f"a {kind} is missing or was changed since validate"
            inspection.error(Stale, "dataset.changed", what, dataset / path, RUN_AGAIN)
    if inspection.depth.deep:
        _validate_again(inspection, chain["validate"], items)
    else:
        inspection.leave_out("the captions of the dataset (verify --deep)")


def _validate_again(inspection: Inspection, validated: Artifact, items: list[dict[str, Any]]) -> None:
    """Compare items and captions with what the dataset folder gives now."""
    from schemas.tables import CAPTIONS
    from stages.dataset.items import build_items
    from stages.stores.tables import read_table

    job, (manifest, folder) = inspection.job, validated
    settings = {name: value for name, value in keyed(job.config.validate).items() if name in manifest.params}
    if canonical_json(settings) != canonical_json({name: manifest.params[name] for name in settings}):
        inspection.leave_out("the captions of the dataset (the settings of validate changed since)")
        return
    beside = job.config.validate.class_dataset
    try:
        found = build_items(
            job.dataset,
            job.config.validate,
            manifest.params["text_length"],
            lambda _done, _total: None,
            None if beside is None else job.located(beside),
        )
    except Stopped:
        raise
    except StageError as error:
        inspection.failed(error)
        return
    inspection.checked += len(found.items)
    before = {(row["item_id"], row["path"]) for row in items}
    now = {(item.item_id, item.path) for item in found.items}
    texts = {row["caption_id"]: row["text"] for row in read_table(folder / CAPTIONS.name, CAPTIONS)}
    for path in sorted({path for _, path in before ^ now}):
        what = "a picture, its crop or its caption is not what validate saw"
        if inspection.sound(job.dataset / path):
            inspection.error(Stale, "dataset.changed", what, job.dataset / path, RUN_AGAIN)
    if texts != found.captions and before == now:
        inspection.error(Stale, "dataset.changed", "the captions are not what validate saw", job.dataset, RUN_AGAIN)


def check_model(inspection: Inspection, chain: Chain) -> None:
    """Hash the model's tensors again: each stage was made with those of its part."""
    if inspection.depth.quick:
        inspection.leave_out("the model's files (left out by --quick)")
        return
    from stages.flux2 import load
    from stages.flux2.identity import model_without_making

    parts = {
        "encode-latents": ("autoencoder", load.autoencoder_encoder_digest),
        "encode-text": ("text_encoder", load.text_encoder_digest),
        "train": ("transformer", load.transformer_digest),
        "preview": ("decoder", load.autoencoder_decoder_digest),
    }
    try:
        model = model_without_making(inspection.job)
        for stage, (role, digest) in parts.items():
            if stage in chain and inspection.depth.reads(f"model/{role}"):
                _compare(inspection, stage, role, chain[stage][0].inputs.get(role) == digest(model))
        if "encode-text" in chain and inspection.depth.reads("model/tokenizer"):
            same = chain["encode-text"][0].inputs.get("tokenizer") == content(model.tokenizer)
            _compare(inspection, "encode-text", "tokenizer", same)
    except (BadConfig, NoResources) as error:
        inspection.leave_out(f"the model's files ({error.faults[0].what})")
    except Damaged as error:
        inspection.failed(error)


def _compare(inspection: Inspection, stage: str, role: str, same: bool) -> None:  # noqa: FBT001
    inspection.checked += 1
    if not same:
        job = inspection.job
        what = f"{stage} was made with another {role} than the model has now"
        inspection.error(Stale, "model.changed", what, job.config.model.source, job.remedy(stage))


class _Shown(msgspec.Struct):
    file: str
    fragment: str


def check_pictures_drawn(inspection: Inspection, chain: Chain) -> None:
    """Check the pictures in the run folder, those of the LoRA that training made."""
    from stages.inspection.training import drawn, shows

    if "preview" not in chain:
        return
    job, (preview, folder) = inspection.job, chain["preview"]
    if "train" in chain and not shows(preview, chain["train"][0]):
        what = "preview shows another LoRA than train has now"
        inspection.error(Stale, "chain.broken", what, job.run, job.remedy("preview"))
        return
    shown = {name: entry for name, entry in preview.files.items() if name.endswith(".png")}
    shown |= {
        each.file: preview.fragments[each.fragment] for each in _index(folder) if each.fragment in preview.fragments
    }
    if last := shown.get(results.preview(max(drawn(preview), default=0))):
        shown[results.LATEST_PREVIEW] = last
    for name, entry in shown.items():
        inspection.result(name, entry, "preview")


def _index(folder: Path) -> Iterator[_Shown]:
    try:
        yield from msgspec.json.decode((folder / "index.json").read_bytes(), type=list[_Shown])
    except (OSError, *UNREADABLE):
        # Among the artifact's files this one is missing or changed already.
        return
