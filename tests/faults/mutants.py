"""Forgeries: one thing about a finished run made untrue, and every digest above it made to agree again.

What a flipped bit breaks, any digest shows. These show whether verify looks at what the bytes say.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from schemas.manifest import CheckpointManifest, Manifest
from schemas.tables import DATASET, EMBEDDING_INDEX, LATENT_INDEX, Table
from stages.contract import artifacts
from stages.contract.artifacts import Plan, artifact_key, record, write_receipt
from stages.contract.digests import canonical_json, digest_of
from stages.contract.runner import Indexed, load_stage
from stages.stores.latents import LatentReader, fragment_files, write_latents
from stages.stores.tables import read_table, write_table
from stages.stores.tensors import Tensor, described, from_mlx, load, save, tensor_digest, to_mlx
from stages.training import checkpoints
from stages.training.data import latent_row
from tests.stages.project import Project, flip

Rows = list[dict[str, Any]]


def only(folder: Path, pattern: str) -> Path:
    """Return the first file or folder that fits."""
    return sorted(folder.glob(pattern))[0]


def artifact(project: Project, stage: str) -> Path:
    return only(project.store, f"{stage}/*")


def manifest_of(folder: Path) -> Manifest:
    return msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)


def resealed(folder: Path, **changes: Any) -> Manifest:
    """Write an artifact's manifest again with changes and a digest of itself that holds."""
    manifest = msgspec.structs.replace(manifest_of(folder), **changes)
    manifest = msgspec.structs.replace(manifest, self_digest=artifacts._self_digest(manifest))
    (folder / "manifest.json").write_bytes(artifacts._written(manifest))
    return manifest


def refiled(folder: Path) -> None:
    """Let the manifest record the artifact's own files as they are."""
    resealed(folder, files={name: record(folder / name) for name in manifest_of(folder).files})


def rekeyed(project: Project, folder: Path, **changes: Any) -> None:
    """Change what an artifact says it was made from, with the key and the receipt that follow."""
    manifest = msgspec.structs.replace(manifest_of(folder), **changes)
    key = artifact_key(manifest.stage, manifest.version, Plan(manifest.params, manifest.inputs))
    moved = folder.rename(folder.parent / key)
    write_receipt(project.results, resealed(moved, **changes, key=key))


def retabled(folder: Path, table: Table, change: Callable[[Rows], Rows]) -> None:
    """Write a table of an artifact again with other rows."""
    rows = change(read_table(folder / table.name, table))
    write_table(folder / table.name, table, rows)
    refiled(folder)


def reshown(project: Project, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Write the finished LoRA again, in the artifact and in the run folder."""
    folder = artifact(project, "train")
    path = folder / "lora.safetensors"
    file = load(path)
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    change(tensors, metadata)
    path.unlink()
    save(path, tensors, metadata)
    shutil.copyfile(path, project.lora)
    refiled(folder)


def repointed(project: Project, change: Callable[[str, np.ndarray], tuple[str, np.ndarray]]) -> None:
    """Store every latent again, changed, and let the index and the manifest refer to that."""
    folder = artifact(project, "encode-latents")
    rows = read_table(folder / LATENT_INDEX.name, LATENT_INDEX)
    reader = LatentReader([project.store])
    changed = [change(row["latent_key"], reader.read(latent_row(row)).copy()) for row in rows]
    written = write_latents(project.store, changed, "float32")
    stored = [msgspec.to_builtins(each) for each in written]
    new = [{**row, **each} for row, each in zip(rows, stored, strict=True)]
    write_table(folder / LATENT_INDEX.name, LATENT_INDEX, new)
    names = {each.fragment for each in written}
    files = [path.relative_to(project.store) for name in names for path in fragment_files(project.store, name)]
    resealed(folder, fragments={path.as_posix(): record(project.store / path) for path in files})
    refiled(folder)


def reroled(project: Project, stage: str) -> None:
    """Let an artifact's roles, its digest and the receipt be those of its tables as they are."""
    folder = artifact(project, stage)
    maker = load_stage(stage)
    assert isinstance(maker, Indexed)
    roles = dict(maker.roles_of(manifest_of(folder), folder))
    write_receipt(project.results, resealed(folder, roles=roles, digest=digest_of(stage, roles)))


def refragmented(project: Project, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the latents' shard and let the manifest record them."""
    shard = only(project.store, "fragments/latents/*/c.0.0.0.0")
    shard.write_bytes(change(shard.read_bytes()))
    folder = artifact(project, "encode-latents")
    names = manifest_of(folder).fragments
    resealed(folder, fragments={name: record(project.store / name) for name in names})


def recheckpointed(
    folder: Path, change: Callable[[dict[str, Tensor]], None], name: str = "state.safetensors", **changes: Any
) -> None:
    """Write the tensors of a checkpoint's file again, and let its manifest record that and `changes`."""
    file = load(folder / name)
    tensors = dict(file.tensors)
    change(tensors)
    (folder / name).unlink()
    save(folder / name, tensors, described(tensors, file.metadata) if file.metadata else {})
    lora = tensor_digest(load(folder / "lora.safetensors").tensors)
    resealed_checkpoint(folder, **{"lora": lora, **changes})


def resealed_checkpoint(folder: Path, **changes: Any) -> None:
    """Write a checkpoint's manifest again with changes, its files as they are and a digest of itself that holds."""
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=CheckpointManifest)
    files = {name: record(folder / name) for name in manifest.files}
    manifest = msgspec.structs.replace(manifest, files=files, **changes)
    manifest = msgspec.structs.replace(manifest, self_digest=checkpoints._self_digest(manifest))
    (folder / "manifest.json").write_bytes(checkpoints._written(manifest))


def relearnt(project: Project, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Put another LoRA in the place of the finished one: checkpoint, artifact, run folder, every digest of it."""
    folder, last = artifact(project, "train"), only(project.store, "checkpoints/*/4")
    recheckpointed(last, change, "lora.safetensors")
    for target in (folder / "lora.safetensors", project.lora, project.results / "checkpoint_4.safetensors"):
        shutil.copyfile(last / "lora.safetensors", target)
    refiled(folder)
    roles = {"lora": tensor_digest(load(project.lora).tensors)}
    write_receipt(project.results, resealed(folder, roles=roles, digest=digest_of("train", roles)))
    (project.results / "preview.json").unlink()


def rewritten_history(project: Project, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Change the lines of the finished training's metrics."""
    folder = artifact(project, "train")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(change(lines)))
    shutil.copyfile(folder / "metrics.jsonl", project.results / "metrics.jsonl")
    refiled(folder)


def respaced(path: Path) -> None:
    path.write_bytes(canonical_json(msgspec.json.decode(path.read_bytes())))


def linked(path: Path) -> None:
    real = path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(real)


def with_field(path: Path) -> None:
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "extra": 1}))


def under_another_key(project: Project) -> None:
    folder = artifact(project, "validate")
    folder.rename(folder.parent / ("0" * 64))
    write_receipt(project.results, msgspec.structs.replace(manifest_of(folder.parent / ("0" * 64)), key="0" * 64))


def under_another_stage(project: Project) -> None:
    folder, source = artifact(project, "encode-text"), artifact(project, "validate")
    shutil.copytree(source, folder.parent / source.name)
    write_receipt(project.results, msgspec.structs.replace(manifest_of(source), stage="encode-text"))


def other_columns(folder: Path) -> None:
    kinds = {**DATASET.columns, "width": "string"}
    rows = [{**row, "width": str(row["width"])} for row in read_table(folder / DATASET.name, DATASET)]
    write_table(folder / DATASET.name, msgspec.structs.replace(DATASET, columns=kinds), rows)
    refiled(folder)


def swapped_rows(rows: Rows) -> Rows:
    first, second, *rest = rows
    return [{**first, "row": second["row"]}, {**second, "row": first["row"]}, *rest]


def unfinished_and_damaged(project: Project) -> None:
    for stage in ("train", "preview"):
        (project.results / f"{stage}.json").unlink()
    for path in (project.store / "checkpoints").glob("*/*/state.safetensors"):
        flip(path)


def littered(project: Project) -> None:
    folder = project.store / ".tmp" / "dead"
    folder.mkdir(parents=True)
    before = time.time() - 3 * 86_400
    os.utime(folder, (before, before))


def edited(path: Path) -> None:
    note = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**note, "params": {**note["params"], "rank": 5}}))


def zeroed(tensors: dict[str, Tensor]) -> None:
    for name, each in tensors.items():
        if "lora_B" in name:
            tensors[name] = Tensor(each.dtype, np.zeros_like(each.data))


def scaled(tensors: dict[str, Tensor], part: str, factor: float) -> None:
    for name, each in tensors.items():
        if part in name and each.dtype in ("F32", "BF16"):
            tensors[name] = from_mlx(to_mlx(each) * factor)


def without(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def too_many_tokens(rows: Rows) -> Rows:
    return [{**row, "tokens": row["length"] + 1} for row in rows]


def embeddings_index(project: Project, change: Callable[[Rows], Rows]) -> None:
    retabled(artifact(project, "encode-text"), EMBEDDING_INDEX, change)
