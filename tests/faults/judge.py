"""Judging a project after a fault by nothing but its files: is everything that can be seen whole?

Nothing of what is tested is used here: manifests are read as JSON, files hashed by hashlib. What the same work gives
when nothing fails is the reference: named by content, a fragment or checkpoint is its bytes or damaged.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

STAGES = ("validate", "encode-latents", "encode-text", "train", "preview")
# Work in progress, locks and what is remembered of stats: never believed, so never published.
UNPUBLISHED = (".tmp", ".locks", "lookup")
# What says how long it took differs between runs: whole, but other bytes.
TIMED = ("metrics.jsonl", "training_curves.png", "manifest.json", "verify.json")
RUNS = "runs"
CONTROL_LOCK = "/.control.lock"


def published(store: Path, kind: str) -> int:
    """Return how many records lie in fragments, by what these say of themselves."""
    if kind == "embeddings":
        from pyarrow import parquet

        return sum(parquet.read_metadata(path).num_rows for path in store.glob(f"fragments/{kind}/*.parquet"))
    return sum(json.loads(path.read_bytes())["shape"][0] for path in store.glob(f"fragments/{kind}/*/zarr.json"))


def half_published(root: Path, reference: Path) -> list[str]:
    """Return what is wrong with what is published in the project at `root`; `reference` is one that never failed."""
    found = [*_store(root / "store", reference / "store")]
    for path in sorted((root / RUNS).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found += _result(path, reference / path.relative_to(root), root / "store")
    for path in sorted((reference / "pictures").rglob("*")):
        if not _same(root / path.relative_to(reference), path):
            found.append(f"{path.name}: a picture or caption of the person's changed")
    return found


def _store(store: Path, reference: Path) -> Iterator[str]:
    for path in sorted(store.glob("*")):
        if path.name not in (*STAGES, "checkpoints", "models", "fragments", *UNPUBLISHED):
            yield f"{path.name}: nothing of that name belongs into a store"
    for folder in (each for stage in STAGES for each in (store / stage).glob("*")):
        yield from _artifact(folder, store)
    for folder in (store / "checkpoints").glob("*/*"):
        yield from _artifact(folder, store)
    for folder in [*(store / "checkpoints").glob("*/*"), *(store / "models").glob("*")]:
        yield from _files(folder, reference / folder.relative_to(store))
    for kind in (store / "fragments").glob("*"):
        yield from _fragments(kind, reference / kind.relative_to(store))


def _artifact(folder: Path, store: Path) -> Iterator[str]:
    """Yield what its manifest lists and is not there, or there and not listed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        yield f"{folder}: {error}"
        return
    for base, records in ((folder, manifest["files"]), (store, manifest.get("fragments", {}))):
        for name, record in records.items():
            path = base / name
            if not path.is_file() or sha256(path.read_bytes()).hexdigest() != record["sha256"]:
                yield f"{path}: not what {folder.name}'s manifest lists"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if names != {*manifest["files"], "manifest.json"}:
        yield f"{folder}: holds {sorted(names)}"


def _files(folder: Path, reference: Path) -> Iterator[str]:
    """Yield files below `folder` that differ from the reference's, and those that are missing."""
    for path in reference.rglob("*"):
        mine = folder / path.relative_to(reference)
        if path.is_file() and path.name not in TIMED and not _same(mine, path):
            yield f"{mine}: missing, or other bytes"


def _fragments(kind: Path, reference: Path) -> Iterator[str]:
    for path in kind.iterdir():
        expected = reference / path.name
        if path.is_dir():
            yield from _files(path, expected) if expected.is_dir() else [f"{path}: unknown"]
        elif not _same(path, expected):
            yield f"{path}: unknown, or other bytes"


def _result(path: Path, reference: Path, store: Path) -> Iterator[str]:
    """Yield what is wrong with a file of the run folder; metrics are a live log until the training ends."""
    data = path.read_bytes()
    if path.stem in STAGES:
        receipt = _json(data)
        if not receipt or not (store / path.stem / receipt["key"] / "manifest.json").is_file():
            yield f"{path}: a receipt for nothing"
    elif path.suffix == ".png" and path.name in TIMED:
        try:
            Image.open(io.BytesIO(data)).load()
        except (OSError, SyntaxError) as error:
            yield f"{path}: {error}"
    elif path.suffix in (".png", ".safetensors") and not _same(path, reference) and not _drawn(path, reference):
        yield f"{path}: other bytes"
    elif path.suffix == ".json" and _json(data) is None:
        yield f"{path}: not JSON"


def _drawn(path: Path, reference: Path) -> bool:
    """Whether the picture is one that the run gives at an earlier moment: the latest, or a sheet of fewer steps."""
    if path.name == "previews.png":
        with Image.open(path) as picture:
            picture.load()
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
    return path.name == "preview_latest.png" and any(_same(path, each) for each in reference.parent.glob("*.png"))


def _json(data: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _same(path: Path, other: Path) -> bool:
    plain = path.is_file() and not path.is_symlink()
    return plain and other.is_file() and path.read_bytes() == other.read_bytes()


def differences(root: Path, reference: Path) -> list[str]:
    """Return in what a project that healed differs from the reference: names, and bytes but for what is timed."""
    names, expected = _names(root), _names(reference)
    found = [f"{name}: litter" for name in sorted(names - expected)]
    found += [f"{name}: missing" for name in sorted(expected - names)]
    for name in sorted(names & expected):
        # A lock is held or free whatever its file says; receipts hold the digests of what is timed.
        timed = (
            Path(name).name in TIMED or name.endswith(".lock") or (name.startswith(RUNS) and name.endswith(".json"))
        )
        if (reference / name).is_file() and not timed and not _same(root / name, reference / name):
            found.append(f"{name}: other bytes")
    for path in reference.glob(f"{RUNS}/*/metrics.jsonl"):
        if _untimed(root / path.relative_to(reference)) != _untimed(path):
            found.append(f"{path.name}: other steps or numbers")
    return found


def _names(root: Path) -> set[str]:
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*"))
    # A training's lock that nobody holds is no news: the next training takes it, and lets it go.
    return {name for name in paths if not name.startswith("store/lookup/") and not name.endswith(CONTROL_LOCK)}


def _untimed(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
    return [{name: line[name] for name in line if name not in ("seconds", "peak_bytes")} for line in lines]
