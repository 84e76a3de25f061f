"""The chain from the LoRA back to the pictures as a list: what each stage made, and of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas import results
from schemas.manifest import Manifest, in_order
from stages.pages.record import STAGES, Record

TITLES = {
    "train": "LoRA",
    "preview": "Previews",
    "encode-text": "Embeddings",
    "encode-latents": "Latents",
    "validate": "Dataset",
}
# A LoRA by step: the checkpoints' own list has them.
SHOWN_LORA = "lora "


@dataclass(frozen=True)
class Input:
    """One thing a stage read; `source` is the stage that made it, "" for what came from outside."""

    role: str
    digest: str
    source: str
    stale: bool


@dataclass(frozen=True)
class Link:
    """What one stage made."""

    stage: str
    title: str
    digest: str
    key: str
    counts: str
    inputs: Sequence[Input]


@dataclass(frozen=True)
class Timing:
    """How long a stage took when it made what it made, and with what; `device` is "" where that is not known."""

    stage: str
    seconds: float | None
    counts: str
    software: str
    device: str


def chain_of(record: Record) -> list[Link]:
    """Return what was made, from the LoRA and its pictures back to the dataset."""
    return [_link(stage, record.made) for stage in TITLES if stage in record.made]


def checkpoints_of(record: Record) -> list[tuple[str, str]]:
    """Return (file, tensor digest) of every saved LoRA of the training, by step; "" for one the store lost."""
    saved = dict(record.training.saved) if record.training is not None else {}
    found = {results.checkpoint(step): digest for step, digest in sorted(saved.items())}
    for path in record.folder.glob("checkpoint_*.safetensors"):
        found.setdefault(path.name, "")
    return sorted(found.items(), key=lambda each: (len(each[0]), each[0]))


def timings_of(record: Record) -> list[Timing]:
    """Return how long each stage took, in their order."""
    timings: list[Timing] = []
    for stage in STAGES:
        if stage in record.made:
            manifest = record.made[stage]
            about = dict(manifest.provenance)
            seconds, device = _seconds(about.pop("seconds", "")), about.pop("device", "")
            software = ", ".join(f"{name} {each}" for name, each in about.items())
            timings.append(Timing(stage, seconds, _counts(manifest), software, device))
    return timings


def _link(stage: str, made: Mapping[str, Manifest]) -> Link:
    manifest = made[stage]
    roles = {digest: name for name, each in made.items() for digest in each.roles.values()}
    known = {role for name, each in made.items() if name != stage for role in each.roles}
    inputs = [
        Input(role, digest, roles.get(digest, ""), stale=role in known and digest not in roles)
        for role, digest in manifest.inputs.items()
        if not role.startswith(SHOWN_LORA)
    ]
    return Link(stage, TITLES[stage], manifest.digest, manifest.key, _counts(manifest), inputs)


def _counts(manifest: Manifest) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in in_order(manifest.counts) if count)


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
