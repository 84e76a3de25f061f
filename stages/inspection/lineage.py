"""The chain of a run: its receipts, the artifacts they name, and that each was made from the one before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import Damaged, Stale
from schemas.manifest import Manifest, Receipt
from stages.contract.artifacts import find, read_manifest, receipt_bytes
from stages.contract.digests import digest_of
from stages.contract.publish import read_regular
from stages.contract.runner import STAGES, load_stage
from stages.inspection.findings import Artifact, Chain, Inspection

MAKERS = tuple(stage for stage in STAGES if stage != "verify")
# Which role of which stage each input of a stage must be: the links of the chain.
LINKS = {
    "validate": {},
    "encode-latents": {"pictures": ("validate", "pictures"), "masks": ("validate", "masks")},
    "encode-text": {"captions": ("validate", "captions")},
    "train": {
        "items": ("validate", "items"),
        "latents": ("encode-latents", "latents"),
        "caption": ("encode-text", "caption"),
        "empty": ("encode-text", "empty"),
        "class": ("encode-text", "class"),
        "masks": ("encode-latents", "masks"),
    },
    "preview": {"prompt": ("encode-text", "prompt"), "empty": ("encode-text", "empty")},
}
# Inputs that not every artifact has: training reads class captions only where it preserves them.
OPTIONAL = {"masks", "class"}
# What comes from outside the chain: the dataset, the model, a LoRA to go on from, and the choice of what is held out.
OUTSIDE = {
    "validate": ("folder", "class_folder"),
    "encode-latents": ("autoencoder",),
    "encode-text": ("text_encoder", "tokenizer"),
    "train": ("transformer", "init_lora", "held_out"),
    "preview": ("transformer", "decoder"),
}
SHOWN = re.compile(r"lora [0-9]+")


def chain_of(inspection: Inspection) -> Chain:
    """Return the artifact of every stage that the run has a receipt for, and note what is wrong with the others."""
    chain = dict(_artifacts(inspection))
    for stage, (manifest, folder) in chain.items():
        _identity(inspection, stage, manifest, folder)
        _links(inspection, stage, chain)
    return chain


def made_of(stage: str, source: str, chain: Chain) -> bool:
    """Whether `stage` was made from what `source` has now: else one says nothing about the other."""
    if stage not in chain or source not in chain:
        return False
    made_from, roles = chain[stage][0].inputs, chain[source][0].roles
    links = {role: name for role, (origin, name) in LINKS[stage].items() if origin == source}
    return all(made_from.get(role) == roles.get(name) for role, name in links.items() if role in made_from)


def _artifacts(inspection: Inspection) -> Iterator[tuple[str, Artifact]]:
    job = inspection.job
    for stage in MAKERS:
        path = job.run_folder / f"{stage}.json"
        if not path.exists() and not path.is_symlink():
            inspection.error(
                Stale, "stage.not_run", f"{stage} has no receipt in this run", job.run, job.remedy(stage)
            )
            continue
        receipt = _receipt(inspection, path, stage)
        if receipt is None:
            continue
        folder = find(stage, receipt.key, job.stores)
        if folder is None:
            what = f"the artifact that {stage}'s receipt names is gone"
            inspection.error(Stale, "artifact.missing", what, receipt.key, job.remedy(stage))
            continue
        inspection.checked += 1
        with inspection.noting():
            manifest = read_manifest(folder)
            if manifest.digest != receipt.digest:
                what = "the artifact is not the one the receipt was written for"
                inspection.error(Damaged, "receipt.digest", what, folder, job.remedy(stage))
            yield stage, (manifest, folder)


def _receipt(inspection: Inspection, path: Path, stage: str) -> Receipt | None:
    """Return a receipt that is to the byte what was written; else note it."""
    inspection.checked += 1
    try:
        data = read_regular(path)
        receipt = msgspec.json.decode(data, type=Receipt)
    except (OSError, *UNREADABLE):
        receipt = None
    else:
        if data != receipt_bytes(receipt) or receipt.stage != stage:
            receipt = None
    if receipt is None:
        what = f"{stage}'s receipt is not what was written"
        inspection.error(Damaged, "receipt.unreadable", what, path, inspection.job.remedy(stage))
    return receipt


def _identity(inspection: Inspection, stage: str, manifest: Manifest, folder: Path) -> None:
    """Check that this program made the artifact in its present version, and that its digest is that of its roles."""
    remedy = inspection.job.remedy(stage)
    expected = load_stage(stage).version
    if manifest.version != expected:
        what = f"{stage} makes version {expected} now, the artifact is of version {manifest.version}"
        inspection.error(Stale, "manifest.version", what, folder, remedy)
    if manifest.digest != digest_of(stage, manifest.roles):
        what = "the artifact's digest is not that of its roles"
        inspection.error(Damaged, "manifest.digest", what, folder, remedy)


def _links(inspection: Inspection, stage: str, chain: Chain) -> None:
    """Compare what a stage was made from with what the stages before it made; nothing else may be an input."""
    job, made_from = inspection.job, chain[stage][0].inputs
    for role, (source, name) in LINKS[stage].items():
        if role not in made_from:
            if role not in OPTIONAL:
                what = f"{stage} names no {role} that it was made from"
                inspection.error(Damaged, "chain.input", what, chain[stage][1], job.remedy(stage))
        elif source in chain and made_from[role] != chain[source][0].roles.get(name):
            what = f"{stage} was made from other {role} than {source} has now"
            inspection.error(Stale, "chain.broken", what, job.run, job.remedy(stage))
    known = {*LINKS[stage], *OUTSIDE[stage]}
    for role in made_from:
        if role not in known and not (stage == "preview" and SHOWN.fullmatch(role)):
            what = f"{stage} was made from {role}, which is nothing that {stage} reads"
            inspection.error(Damaged, "chain.input", what, chain[stage][1], job.remedy(stage))
