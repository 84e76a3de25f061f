"""Checkpoints: everything a training needs to go on, published whole, found by trajectory and step.

`<store>/checkpoints/<trajectory>/<step>/` holds the training state in float32, the LoRA people use, and the metrics
up to that step. A step's folder name is its number without padding. Finding checkpoints imports nothing heavy: a
stage that is up to date does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import GIVEN, Damaged, Fault, Stale
from schemas.manifest import CONTRACT_VERSION, CheckpointManifest, Manifest
from schemas.schedules import Schedule
from stages.contract.artifacts import MANIFEST, record
from stages.contract.digests import canonical_json, digest_of, sha256_bytes, sha256_file
from stages.contract.publish import publish_folder, regular, workspace
from stages.training.schedules import depends_on_total

if TYPE_CHECKING:
    from stages.stores.tensors import Tensor, TensorFile

# Raised whenever the same trajectory would take other steps.
VERSION = 1
STATE = "state.safetensors"
LORA = "lora.safetensors"
EMA = "ema.safetensors"
METRICS = "metrics.jsonl"
FOLDER = "checkpoints"
REMEDY = "delete that folder; training resumes from the checkpoint before"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder and proved manifest."""

    folder: Path
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def lora(self) -> Path:
        """The LoRA file."""
        return self.folder / LORA

    @property
    def ema(self) -> Path | None:
        """The LoRA file of the moving average; None when none was kept."""
        return None if self.manifest.ema is None else self.folder / EMA

    def shown(self, *, ema: bool) -> tuple[Path, str]:
        """Return the file that previews are drawn with, and its tensor digest. Raises Damaged when there is none."""
        digest = self.manifest.ema if ema else self.manifest.lora
        if digest is None:
            raise self._damaged(EMA, "it was saved without a moving average")
        return self.folder / (EMA if ema else LORA), digest

    def state(self) -> dict[str, Tensor]:
        """Return the training state. Raises Damaged when its bytes changed."""
        return self._load(STATE).tensors

    def metrics(self) -> list[dict[str, float]]:
        """Return the metrics lines up to this step. Raises Damaged when the bytes changed."""
        data = (self.folder / METRICS).read_bytes()
        if sha256_bytes(data) != self.manifest.files[METRICS].sha256:
            raise self._damaged(METRICS, "its bytes changed")
        return [msgspec.json.decode(line) for line in data.splitlines()]

    def check(self) -> None:
        """Raise Damaged unless every file is there with the recorded bytes."""
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
                raise self._damaged(name, "missing or changed")

    def _load(self, name: str) -> TensorFile:
        from stages.stores.tensors import load

        return load(self.folder / name, sha256=self.manifest.files[name].sha256)

    def _damaged(self, name: str, why: str) -> Damaged:
        where = str(self.folder / name)
        return Damaged("checkpoint.damaged", "a damaged checkpoint", where=where, why=why, fix=REMEDY)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from."""

    step: int
    public: bool
    state: Mapping[str, Tensor]
    lora: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    metadata: Mapping[str, str]
    metrics: Sequence[Mapping[str, float]]
    computed_on: tuple[str, ...] = ()


def write_checkpoint(store: Path, trajectory: str, snapshot: Snapshot) -> Checkpoint:
    """Publish a checkpoint and return it; an equal one that is there already stays."""
    from stages.stores.tensors import described, save, tensor_digest

    with workspace(store) as space:
        work = space / "checkpoint"
        work.mkdir()
        save(work / STATE, snapshot.state, {})
        save(work / LORA, snapshot.lora, described(snapshot.lora, snapshot.metadata))
        if snapshot.ema is not None:
            save(work / EMA, snapshot.ema, described(snapshot.ema, snapshot.metadata))
        (work / METRICS).write_bytes(metrics_lines(snapshot.metrics))
        manifest = CheckpointManifest(
            contract=CONTRACT_VERSION,
            trajectory=trajectory,
            step=snapshot.step,
            public=snapshot.public,
            lora=tensor_digest(snapshot.lora),
            files={path.name: record(path) for path in sorted(work.iterdir())},
            self_digest="",
            ema=None if snapshot.ema is None else tensor_digest(snapshot.ema),
            computed_on=snapshot.computed_on,
        )
        manifest = msgspec.structs.replace(manifest, self_digest=_self_digest(manifest))
        (work / MANIFEST).write_bytes(_written(manifest))
        folder = trajectory_folder(store, trajectory) / str(snapshot.step)
        publish_folder(work, folder)
    return Checkpoint(folder, manifest)


def metrics_lines(metrics: Sequence[Mapping[str, float]]) -> bytes:
    """Return metrics as JSON lines."""
    return b"".join(msgspec.json.encode(line) + b"\n" for line in metrics)


def trajectory_folder(store: Path, trajectory: str) -> Path:
    """Return the folder of a trajectory's checkpoints."""
    return store / FOLDER / trajectory


def trajectory_of(params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the key of all that affects a step: a train plan, its `steps` only where the schedule looks at them."""
    settings = {name: value for name, value in params.items() if not (name == "steps" and timeless(params))}
    return digest_of("trajectory", {"version": VERSION, "settings": settings, "inputs": inputs})


def timeless(params: Mapping[str, Any]) -> bool:
    """Return whether a train plan's schedule is the same whatever its `steps`: more of them continue it."""
    return not depends_on_total(msgspec.convert(params["schedule"], Schedule))


def public_checkpoints(
    stores: Sequence[Path], train: Manifest, every: int
) -> tuple[list[Checkpoint], dict[int, Damaged]]:
    """Return the checkpoints of a finished training that people see: every `every` steps, and the last.

    With them comes, by step, what is wrong with those of them that cannot be read.
    """
    steps = train.params["steps"]
    found, unreadable = find_checkpoints(stores, trajectory_of(train.params, train.inputs))

    def public(step: int) -> bool:
        return step == steps or (step < steps and step % every == 0)

    return [each for each in found if public(each.step)], {
        step: error for step, error in unreadable.items() if public(step)
    }


def list_checkpoints(stores: Sequence[Path], trajectory: str) -> list[Checkpoint]:
    """Return every checkpoint with a readable manifest, by step; the first store that has a step wins."""
    return find_checkpoints(stores, trajectory)[0]


def find_checkpoints(stores: Sequence[Path], trajectory: str) -> tuple[list[Checkpoint], dict[int, Damaged]]:
    """Return the checkpoints of `list_checkpoints`, and why no store has a readable one of the other steps."""
    found: dict[int, Checkpoint] = {}
    unreadable: dict[int, Damaged] = {}
    for step, path in reversed(_folders(stores, trajectory)):
        try:
            found[step] = Checkpoint(path, read_checkpoint_manifest(path))
        except Damaged as error:
            unreadable[step] = error
    return [found[step] for step in sorted(found)], {
        step: unreadable[step] for step in sorted(unreadable.keys() - found.keys())
    }


def _folders(stores: Sequence[Path], trajectory: str) -> list[tuple[int, Path]]:
    """Return (step, folder) of all that is called a checkpoint, in the order of the stores."""
    folders = [folder for store in stores if (folder := trajectory_folder(store, trajectory)).is_dir()]
    paths = [path for folder in folders for path in folder.iterdir()]
    return [(int(path.name), path) for path in paths if path.name.isascii() and path.name.isdigit()]


def newest(
    stores: Sequence[Path], trajectory: str, most_steps: int, warn: Callable[[str], None]
) -> Checkpoint | None:
    """Return the newest whole checkpoint of at most `most_steps`; None when there is none at all.

    Damaged ones are passed over with a warning. Raises Damaged when all are, rather than start over by itself.
    """
    candidates = [each for each in _folders(stores, trajectory) if each[0] <= most_steps]
    damage: list[tuple[int, Fault]] = []
    for step, path in sorted(candidates, key=lambda each: -each[0]):
        try:
            checkpoint = Checkpoint(path, read_checkpoint_manifest(path))
            checkpoint.check()
        except Damaged as error:
            damage.append((step, error.faults[0]))
        else:
            for lost, fault in damage:
                warn(f"{fault.line()} (falling back to step {step}, {lost - step} steps earlier)")
            return checkpoint
    if damage:
        # None is left to resume from, so their own remedy would lead to a fresh start unasked.
        fix = f"restore one of them from a copy, or start over: flux2-lora train {GIVEN} --force"
        raise Damaged.of(msgspec.structs.replace(fault, fix=fix) for _, fault in damage)
    return None


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """Return a checkpoint's manifest, proved by its own digest. Raises Damaged, or Stale for another version's."""
    path = folder / MANIFEST
    try:
        with open(path, "rb", opener=regular) as file:
            data = file.read()
        manifest = msgspec.json.decode(data, type=CheckpointManifest)
    except (OSError, *UNREADABLE) as error:
        raise Damaged(
            "checkpoint.unreadable", "no readable manifest", where=str(path), why=str(error), fix=REMEDY
        ) from error
    names = (str(manifest.step), manifest.trajectory)
    sound = manifest.self_digest == _self_digest(manifest) and data == _written(manifest)
    if not sound or names != (folder.name, folder.parent.name):
        raise Damaged("checkpoint.altered", "the manifest is not what it says", where=str(path), fix=REMEDY)
    if manifest.contract != CONTRACT_VERSION:
        raise Stale(
            "checkpoint.version",
            "the checkpoint was made by another version of this program",
            where=str(path),
            why=f"expected contract {CONTRACT_VERSION}, found {manifest.contract}",
            fix="use that version, or another store",
        )
    return manifest


def _written(manifest: CheckpointManifest) -> bytes:
    return msgspec.json.format(canonical_json(manifest)) + b"\n"


def _self_digest(manifest: CheckpointManifest) -> str:
    return sha256_bytes(canonical_json(msgspec.structs.replace(manifest, self_digest="")))
