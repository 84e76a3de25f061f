"""The files of an artifact: each there, whole, where it belongs and nobody else's; and no other beside them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections import defaultdict
from pathlib import Path

from schemas.errors import Damaged, Untrusted
from stages.contract.artifacts import MANIFEST, holder
from stages.contract.formats import require_format
from stages.contract.publish import TEMPORARY
from stages.inspection.findings import Artifact, Inspection

DAY_SECONDS = 86_400
WORLD_WRITABLE = stat.S_IWOTH


def check_files(inspection: Inspection, stage: str, artifact: Artifact) -> None:
    """Check every file that an artifact consists of or refers to."""
    manifest, folder = artifact
    job = inspection.job
    store = folder.parent.parent
    fix = f"{job.remedy(stage)} --force"
    _place(inspection, folder / MANIFEST, store)
    for name, entry in manifest.files.items():
        inspection.file(folder / name, entry, f"{stage}/{folder.name}/{name}", fix)
        _place(inspection, folder / name, store)
    fragments: defaultdict[Path, set[Path]] = defaultdict(set)
    for name, entry in manifest.fragments.items():
        store = holder(name, job.stores)
        path = store / name
        inspection.file(path, entry, name, fix)
        _place(inspection, path, store)
        fragments[path.parent].add(path)
    unlisted(inspection, folder, {folder / name for name in (*manifest.files, MANIFEST)})
    for inner, listed in fragments.items():
        if len(inner.name) == 64:
            unlisted(inspection, inner, listed)


def unlisted(inspection: Inspection, folder: Path, listed: set[Path]) -> None:
    """Check that a folder holds no file but those listed."""
    folders = {parent for path in listed for parent in path.parents}
    for path in sorted(folder.rglob("*")):
        if path not in listed and path not in folders:
            inspection.error(Damaged, "file.unlisted", "a file no manifest lists", path, "delete it")


def _place(inspection: Inspection, path: Path, store: Path) -> None:
    """Check that no link leads there, and that only the store's owner can have written it."""
    on_the_way = [path, *(each for each in path.parents if each.is_relative_to(store) and each != store)]
    for each in on_the_way:
        if each.is_symlink() and each.exists():
            what = "a link inside the store leads elsewhere"
            inspection.error(Damaged, "file.link", what, each, "replace it by what it leads to")
            return
    if not path.is_file():
        return
    found, root = path.stat(), store.stat()
    if found.st_uid != root.st_uid:
        what = f"a file belongs to user {found.st_uid}, the store to user {root.st_uid}"
        inspection.error(Untrusted, "file.owner", what, path, f"chown {root.st_uid} that file if you trust it")
    if found.st_mode & WORLD_WRITABLE:
        what = "anyone on this machine can change a file"
        inspection.error(Untrusted, "file.writable", what, path, "chmod o-w that file if you trust it")


def check_stores(inspection: Inspection) -> None:
    """Check that nobody but its owner can put anything into our store, and tell of what dead processes left."""
    job = inspection.job
    inspection.checked += 1
    with inspection.noting():
        require_format(job.store)
    for folder in _open_to_all(job.store):
        what = "anyone on this machine can put files into the store"
        inspection.error(Untrusted, "store.writable", what, folder, "chmod o-w that folder if you trust it")
    for path in sorted((job.store / "lookup").glob("*.sqlite")):
        _place(inspection, path, job.store)
    if litter := [path for path in (job.store / TEMPORARY).glob("*") if is_litter(path)]:
        what = f"{len(litter)} things that dead processes left in {job.store / TEMPORARY}"
        inspection.hint("store.litter", what, "the next stage that makes anything removes them, and so does gc")


def _open_to_all(store: Path) -> list[Path]:
    """Return the folders of a store, at any depth, that anyone can put something into."""
    found: list[Path] = []
    for folder in (Path(place) for place, _, _ in os.walk(store)):
        # A stage at work takes folders away meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found += [folder] if folder.stat().st_mode & WORLD_WRITABLE else []
    return sorted(found)


def is_litter(path: Path) -> bool:
    """Whether a thing in the work folder is older than a day and belongs to no living process."""
    if path.suffix in (".lock", ".new") or time.time() - path.lstat().st_mtime < DAY_SECONDS:
        return False
    lock = path.with_suffix(".lock")
    if not lock.is_file():
        return True
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        # Held, or nobody knows: then it is not called dead.
        return False
    return True
