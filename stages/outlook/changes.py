"""Why a stage would work: what differs from what its run was last made from, followed back to where it began.

A difference in an input that another stage made is that stage's difference; the ends are settings, pictures,
captions, a model's files, and this program's own versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from schemas.base import Strict
from schemas.errors import Damaged, Stale
from schemas.manifest import CONTRACT_VERSION, Manifest
from stages.contract.artifacts import MANIFEST, find, read_manifest, read_receipt
from stages.contract.digests import is_unknown, unknown
from stages.contract.job import Job
from stages.contract.runner import flattened
from stages.flux2.folder import ModelFiles
from stages.flux2.identity import drawing_model_of, model_of
from stages.inspection.lineage import LINKS, SHOWN
from stages.outlook.chain import Ahead, Outlook
from stages.outlook.dataset import Role, dataset_changes

Status = Literal["up to date", "changed", "never made", "gone"]
Kind = Literal["setting", "picture", "caption", "mask", "file", "model", "code", "input"]

# What a setting is called in the configuration where that is not [stage] and the field's name.
NAMES = {
    ("train", "seed"): "run.seed",
    ("train", "quantize"): "model.quantize",
    ("preview", "quantize"): "model.quantize",
    ("encode-text", "prompts"): "preview.prompts",
    ("encode-text", "class_captions"): "train.preservation",
    ("encode-text", "layers"): "the text encoder's layers",
    ("encode-text", "length"): "the text encoder's length",
    ("validate", "text_length"): "the text encoder's length",
    ("validate", "plan_version"): "the version of crops",
}
# Settings that a role of a stage does not depend on.
NO_PART = {
    ("validate", "captions"): (
        "resolutions",
        "upscale",
        "background",
        "masks",
        "repeats",
        "text_length",
        "plan_version",
    ),
    ("encode-text", "caption"): ("prompts", "class_captions"),
    ("encode-text", "empty"): ("prompts", "class_captions"),
    ("encode-text", "prompt"): ("class_captions",),
    ("encode-text", "class"): ("prompts",),
}
PARTS = {
    "autoencoder": "autoencoder",
    "decoder": "autoencoder",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
    "transformer": "transformer",
}
SHORT_DIGEST = 12
NOT_KNOWN = "not known yet"
NOT_YET = unknown("output")


class Change(Strict, frozen=True):
    """One thing that is not what it was. `name` is a dotted field, a file, or a part of the model.

    `through` are the stages it reaches the asked one by, first the one it begins at.
    """

    kind: Kind
    name: str
    old: str
    new: str
    through: tuple[str, ...]

    def line(self) -> str:
        """Return it as a line for the person."""
        way = f"  ({' > '.join(self.through)})" if len(self.through) > 1 else ""
        return f"{self.name}: {self.old} -> {self.new}{way}"


class Why(Strict, frozen=True):
    """Whether a stage would work, and because of what. What `changed` lists at least one change."""

    stage: str
    status: Status
    changes: tuple[Change, ...] = ()

    def line(self) -> str:
        """Return it in a few words."""
        if self.status != "changed":
            return self.status
        more = f" (+{len(self.changes) - 1})" if len(self.changes) > 1 else ""
        return f"{next(iter(self.changes)).name.partition(' (')[0]}{more}"


def why(job: Job, ahead: Ahead, name: str) -> Why:
    """Return why the stage would work, or that it would not."""
    now, receipt = ahead[name], read_receipt(job.run_folder, name)
    if now.done:
        return Why(stage=name, status="up to date")
    if receipt is None:
        return Why(stage=name, status="never made")
    folder = find(name, receipt.key, job.stores)
    if receipt.key == now.manifest.key or folder is None:
        return Why(stage=name, status="gone")
    try:
        before = read_manifest(folder)
    except Damaged:
        return Why(stage=name, status="gone")
    except Stale:
        change = Change(
            kind="code", name="the store's format", old="another", new=str(CONTRACT_VERSION), through=(name,)
        )
        return Why(stage=name, status="changed", changes=(change,))
    return Why(stage=name, status="changed", changes=_merged(_Search(job, ahead).stage(before, None)))


def _merged(changes: Iterator[Change]) -> tuple[Change, ...]:
    """Return each change once, through all the stages that any of its ways leads through."""
    found: dict[tuple[str, ...], Change] = {}
    for each in changes:
        same = found.setdefault((each.kind, each.name, each.old, each.new), each)
        if same is not each:
            through = tuple(stage for stage in LINKS if stage in {*same.through, *each.through})
            found[each.kind, each.name, each.old, each.new] = msgspec.structs.replace(same, through=through)
    return tuple(found.values())


class _Search:
    """Compares what artifacts were made from with what is there now."""

    def __init__(self, job: Job, ahead: Ahead) -> None:
        self._job = job
        self._ahead = ahead

    def stage(self, before: Manifest, role: str | None) -> Iterator[Change]:
        """Yield what a stage's artifact was made from that is different now, as far as `role` depends on it."""
        now = self._ahead[before.stage]
        if before.version != now.manifest.version:
            old, new = str(before.version), str(now.manifest.version)
            yield self._change(before, "code", f"the version of {before.stage}", old, new)
        yield from self._settings(before, now, role)
        old, new = before.inputs, now.plan.inputs
        if shown := [name for name in {*old, *new} if SHOWN.fullmatch(name) and old.get(name) != new.get(name)]:
            yield from self._shown(before, now, shown)
        for name in sorted({*old, *new}.difference(shown)):
            if old.get(name) != new.get(name):
                yield from self._input(before, name, role)

    def _change(self, before: Manifest, kind: Kind, name: str, old: str, new: str) -> Change:
        return Change(kind=kind, name=name, old=old, new=new, through=(before.stage,))

    def _settings(self, before: Manifest, now: Outlook, role: str | None) -> Iterator[Change]:
        left_out = NO_PART.get((before.stage, role or ""), ())
        old, new = flattened(before.params), flattened(now.plan.params)
        for field in sorted({*old, *new}):
            if old.get(field) != new.get(field) and field.split(".")[0] not in left_out:
                name = NAMES.get((before.stage, field.split(".")[0]), f"{before.stage.replace('-', '_')}.{field}")
                yield self._change(before, "setting", name, *_shown_values(old.get(field), new.get(field)))

    def _input(self, before: Manifest, name: str, role: str | None) -> Iterator[Change]:
        """Yield the changes behind an input."""
        old, new = before.inputs.get(name, "none"), self._ahead[before.stage].plan.inputs.get(name, "none")
        if name in LINKS[before.stage]:
            yield from self._linked(before, name, old, new)
        elif name in ("folder", "class_folder"):
            yield from self._dataset(before, name, role)
        elif name in PARTS:
            yield self._change(
                before, "model", f"the model's {name} ({self._file(before.stage, name)})", *_digests(old, new)
            )
        elif name == "init_lora":
            file = self._job.config.train.init_lora or "none"
            yield self._change(before, "file", f"train.init_lora ({file})", *_digests(old, new))
        else:
            yield self._change(
                before, "setting", "train.validation (which pictures are held out)", *_digests(old, new)
            )

    def _linked(self, before: Manifest, name: str, old: str, new: str) -> Iterator[Change]:
        """Yield the changes of the stage that makes the input `name`."""
        source, role = LINKS[before.stage][name]
        origin = self._made(source, role, old)
        behind = [] if origin is None else list(self.stage(origin, role))
        for each in behind:
            yield msgspec.structs.replace(each, through=(*each.through, before.stage))
        if not behind:
            made = self._ahead[source].done
            yield self._change(before, "input", f"{name} of {source}", *_digests(old, new if made else NOT_YET))

    def _shown(self, before: Manifest, now: Outlook, names: list[str]) -> Iterator[Change]:
        """Yield the changes of the training whose LoRAs previews show, else which of its steps are shown."""
        last = before.inputs[max(filter(SHOWN.fullmatch, before.inputs), key=_step)]
        origin = self._made("train", "lora", last) or self._made("train", "ema", last)
        behind = [] if origin is None else list(self.stage(origin, "lora"))
        for each in behind:
            yield msgspec.structs.replace(each, through=(*each.through, before.stage))
        if not behind:
            old, new = (
                sorted(map(_step, filter(SHOWN.fullmatch, each))) for each in (before.inputs, now.plan.inputs)
            )
            what = "the steps shown" if old != new else f"the LoRA of step {_step(names[0])}"
            yield self._change(before, "input", what, *_shown_values(old, new))

    def _made(self, stage: str, role: str, digest: str) -> Manifest | None:
        """Return the manifest of an artifact of `stage` with that role; the run's own rather than another's."""
        receipt = read_receipt(self._job.run_folder, stage)
        own = None if receipt is None else find(stage, receipt.key, self._job.stores)
        others = [path.parent for store in self._job.stores for path in sorted((store / stage).glob(f"*/{MANIFEST}"))]
        for folder in ([own] if own is not None else []) + others:
            try:
                manifest = read_manifest(folder)
            except (Damaged, Stale):
                continue
            if manifest.roles.get(role) == digest:
                return manifest
        return None

    def _dataset(self, before: Manifest, name: str, role: str | None) -> Iterator[Change]:
        folder = find("validate", before.key, self._job.stores)
        found = (
            [] if folder is None else list(_tables_changed(self._job, folder, self._ahead["validate"].folder, role))
        )
        for kind, file, old, new in found:
            yield self._change(before, kind, file, old, new)
        if not found and role is None:
            new = "other bytes, but no picture or caption differs"
            yield self._change(before, "file", f"files in the {name.replace('_', ' ')}", "as they were", new)

    def _file(self, stage: str, part: str) -> str:
        """Return where a part of the model lies."""
        model = drawing_model_of(self._job) if stage == "preview" and part == "transformer" else model_of(self._job)
        files = _files(model, PARTS[part])
        return "not here" if not files else str(files[0] if len(files) == 1 else files[0].parent)


def _tables_changed(job: Job, before: Path, now: Path, role: str | None) -> Iterator[tuple[Kind, str, str, str]]:
    named: Role = role  # pyright: ignore[reportAssignmentType]
    return dataset_changes(job.dataset, before, now, named)


def _files(model: ModelFiles, part: str) -> tuple[Path, ...]:
    return {
        "transformer": model.transformer,
        "autoencoder": model.autoencoder,
        "text_encoder": model.text_encoder,
        "tokenizer": (model.tokenizer,) if model.transformer else (),
    }[part]


def _step(name: str) -> int:
    return int(name.split()[1])


def _digests(old: str, new: str) -> tuple[str, str]:
    def short(digest: str) -> str:
        return NOT_KNOWN if is_unknown(digest) else digest[:SHORT_DIGEST]

    return short(old), short(new)


def _shown_values(old: Any, new: Any) -> tuple[str, str]:
    """Return two values as short text; of two lists what only one of them has."""
    if isinstance(old, list) and isinstance(new, list):
        gone, come = [each for each in old if each not in new], [each for each in new if each not in old]
        if gone or come:
            old, new = gone, come
    return shortened(old), shortened(new)


def shortened(value: object) -> str:
    """Return a value as it stands in the configuration, cut to fit into a line."""
    text = "not set" if value is None else msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
