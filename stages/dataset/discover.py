"""What lies in a dataset folder: pictures, caption files, and everything that cannot be used, without opening a file.

Folders are searched to any depth. Only regular files count; a symlink counts when it ends at a regular file inside
the folder. Names come back relative with `/`, sorted by their UTF-8 bytes, so every system sees the same order.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from schemas.errors import BadConfig, Fault, legible
from stages.contract.digests import State, canonical_json, identity, sha256_bytes, youngest_ns

# Raised whenever the same folder gives another listing: what was remembered of folders is then forgotten.
LISTING_VERSION = 2
# Browsers on Windows save JPEG as .jfif.
JPEG_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif"})
PICTURE_SUFFIXES = JPEG_SUFFIXES | {"png", "webp"}
SIDECAR_SUFFIXES = frozenset({"txt", "caption", "json"})
MASK_ENDING = ".mask.png"
TABLES = frozenset(f"{stem}.{suffix}" for stem in ("metadata", "captions") for suffix in ("jsonl", "csv", "parquet"))
# Pictures a person would miss if they were passed over in silence.
UNREAD_SUFFIXES = frozenset(
    {"avif", "bmp", "eps", "gif", "heic", "heif", "jp2", "jxl", "pdf", "psd", "svg", "tif", "tiff"}
)


class Kind(Enum):
    """What a file is for, judged by its name alone."""

    PICTURE = auto()
    MASK = auto()
    UNREAD = auto()
    CAPTION = auto()
    OTHER = auto()


@dataclass
class Discovery:
    """`pictures`, `masks` and `captions` can be read; `refused` look like pictures and have a fault.

    `orphans` are captions of no picture; `ignored` is a count.
    """

    pictures: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ignored: int = 0
    faults: list[Fault] = field(default_factory=list)


def discover(folder: Path, *, masks: bool = False) -> Discovery:
    """Return everything in `folder`, with one fault for each file or link that cannot be used.

    `captions` are tables and the sidecars of a picture; with `masks`, files called name.mask.png are masks and not
    pictures. Raises BadConfig when `folder` is not a folder.
    """
    if not folder.is_dir():
        raise BadConfig(
            "dataset.missing",
            "the dataset folder does not exist" if not folder.exists() else "the dataset is not a folder",
            where=legible(str(folder)),
            fix="set validate.dataset to the folder of pictures, relative to the configuration file",
        )
    found = Discovery()
    root = folder.resolve()
    for relative, entry in _entries(root, found):
        _sort_in(found, root, relative, entry, _kind_of(entry.name, masks=masks))
    _refuse_twins(found)
    _part_orphans(found)
    for names in (found.pictures, found.masks, found.captions, found.orphans, found.refused):
        names.sort(key=os.fsencode)
    found.faults.sort(key=lambda fault: (fault.where, fault.code))
    return found


def listing(folder: Path, *, masks: bool = False) -> list[str]:
    """Return the files whose content decides what `validate` publishes: pictures, masks and captions, sorted."""
    found = discover(folder, masks=masks)
    return sorted([*found.pictures, *found.masks, *found.captions], key=os.fsencode)


def state(folder: Path) -> State:
    """Return what `folder` looks like without sorting it: every file's name and stat, and where links lead to.

    Whatever changes what `listing` returns, or the bytes of a file of it, changes this. Raises OSError when a folder
    cannot be listed.
    """
    seen: list[str] = []
    youngest = 0
    waiting = [os.fsencode(folder.resolve())]
    while waiting:
        at = waiting.pop()
        rows: list[tuple[object, ...]] = []
        with os.scandir(at) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    continue
                row, changed_ns = _look(entry)
                rows.append(row)
                youngest = max(youngest, changed_ns)
        seen.append(sha256_bytes(canonical_json([at, sorted(rows)])))
    return State(sha256_bytes(canonical_json(sorted(seen))), youngest)


def _look(entry: os.DirEntry[bytes]) -> tuple[tuple[object, ...], int]:
    """Return a file's name and stat, and those of what it leads to; and when any of it changed last."""
    stat = entry.stat(follow_symlinks=False)
    row, changed_ns = (entry.name, *identity(stat)), youngest_ns(stat)
    if not entry.is_symlink():
        return row, changed_ns
    try:
        end, target = entry.stat(), os.path.realpath(entry.path, strict=True)
    except OSError:
        # It leads nowhere, and will look otherwise as soon as it leads somewhere.
        return row, changed_ns
    return (*row, target, *identity(end)), max(changed_ns, youngest_ns(end))


def stem_of(relative: str) -> str:
    """Return the path without its suffix, in NFC: what ties a sidecar to its picture."""
    return unicodedata.normalize("NFC", relative.rpartition(".")[0])


def masked_by(mask: str) -> str:
    """Return the stem of the picture that a mask belongs to."""
    return stem_of(mask[: -len(MASK_ENDING)] + ".")


def _kind_of(name: str, *, masks: bool) -> Kind:
    if masks and name.lower().endswith(MASK_ENDING):
        return Kind.MASK
    suffix = name.rpartition(".")[2].lower()
    if suffix in PICTURE_SUFFIXES:
        return Kind.PICTURE
    if suffix in UNREAD_SUFFIXES:
        return Kind.UNREAD
    if suffix in SIDECAR_SUFFIXES or name.lower() in TABLES:
        return Kind.CAPTION
    return Kind.OTHER


def _entries(root: Path, found: Discovery) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield each visible entry that is not a folder; unreadable folders become faults."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            entries = list(os.scandir(root / prefix))
        except OSError as error:
            found.faults.append(
                Fault(
                    code="folder.unreadable",
                    what="cannot list the folder",
                    where=legible(prefix),
                    why=str(error.strerror),
                    fix="make the folder readable, or move it out of the dataset",
                )
            )
            continue
        for entry in entries:
            if entry.name.startswith("."):
                found.ignored += 1
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry


def _sort_in(found: Discovery, root: Path, relative: str, entry: os.DirEntry[str], kind: Kind) -> None:
    fault = _entry_fault(root, relative, kind, entry)
    if fault is not None:
        found.faults.append(fault)
        if kind in (Kind.PICTURE, Kind.UNREAD):
            found.refused.append(relative)
    elif kind is Kind.PICTURE:
        found.pictures.append(relative)
    elif kind is Kind.MASK:
        found.masks.append(relative)
    elif kind is Kind.CAPTION:
        found.captions.append(relative)
    else:
        found.ignored += 1


def _entry_fault(root: Path, relative: str, kind: Kind, entry: os.DirEntry[str]) -> Fault | None:
    where = legible(relative)
    if entry.is_symlink():
        fault = _link_fault(root, relative, kind)
        if fault is not None:
            return fault
    elif kind is not Kind.OTHER and not entry.is_file(follow_symlinks=False):
        return Fault(
            code="file.not_regular",
            what="not a regular file (a pipe, socket or device)",
            where=where,
            fix="remove it from the dataset",
        )
    if kind is not Kind.OTHER and where != relative:
        return Fault(
            code="name.not_utf8", what="the file name is not UTF-8", where=where, fix="rename the file or its folder"
        )
    if kind is Kind.UNREAD:
        return Fault(
            code="picture.format",
            what="this picture format is not read",
            where=where,
            why="expected JPEG, PNG or WebP",
            fix="convert it to PNG, or move it out of the dataset",
        )
    return None


def _link_fault(root: Path, relative: str, kind: Kind) -> Fault | None:
    where = legible(relative)
    fix = "replace the link by the file itself, or remove it"
    try:
        target = (root / relative).resolve(strict=True)
        is_folder, is_file = target.is_dir(), target.is_file()
    except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
        if kind is Kind.OTHER:
            return None
        return Fault(code="link.broken", what="the link leads nowhere", where=where, fix=fix)
    if is_folder:
        fix = "replace the link by the folder itself, or remove it"
        return Fault(code="link.folder", what="links to folders are not followed", where=where, fix=fix)
    if kind is Kind.OTHER:
        return None
    if not target.is_relative_to(root):
        return Fault(code="link.outside", what="the link leads out of the dataset folder", where=where, fix=fix)
    if not is_file:
        return Fault(code="file.not_regular", what="the link does not lead to a regular file", where=where, fix=fix)
    return None


def _refuse_twins(found: Discovery) -> None:
    """Move files whose names are one and the same on systems that fold case or normalise Unicode to `refused`."""
    twins: dict[str, list[str]] = defaultdict(list)
    for relative in [*found.pictures, *found.masks, *found.captions]:
        twins[unicodedata.normalize("NFC", unicodedata.normalize("NFC", relative).casefold())].append(relative)
    clashing = {relative for names in twins.values() if len(names) > 1 for relative in names}
    if not clashing:
        return
    found.refused += [relative for relative in found.pictures if relative in clashing]
    found.pictures = [relative for relative in found.pictures if relative not in clashing]
    found.masks = [relative for relative in found.masks if relative not in clashing]
    found.captions = [relative for relative in found.captions if relative not in clashing]
    for names in twins.values():
        if len(names) > 1:
            first, *others = sorted(names)
            found.faults.append(
                Fault(
                    code="name.twins",
                    what="these names are the same on other systems (upper and lower case, or composed accents)",
                    where=first,
                    why=f"also {', '.join(ascii(other) for other in others)}",
                    fix="rename all but one of them",
                )
            )


def _part_orphans(found: Discovery) -> None:
    stems = {stem_of(relative) for relative in [*found.pictures, *found.refused]}

    def belongs(relative: str) -> bool:
        return relative.rpartition("/")[2].lower() in TABLES or stem_of(relative) in stems

    found.faults += [_stray_mask_fault(mask) for mask in found.masks if masked_by(mask) not in stems]
    found.masks = [mask for mask in found.masks if masked_by(mask) in stems]
    strays = [relative for relative in found.captions if not belongs(relative)]
    found.captions = [relative for relative in found.captions if belongs(relative)]
    # A stray .json is another tool's business; a stray .txt is more likely a caption whose picture was renamed.
    found.orphans = [relative for relative in strays if not relative.lower().endswith(".json")]
    found.ignored += len(strays) - len(found.orphans)


def _stray_mask_fault(mask: str) -> Fault:
    return Fault(
        code="mask.no_picture",
        what="the mask belongs to no picture",
        where=mask,
        why=f"no picture is called {masked_by(mask)}.*",
        fix="name it as its picture, or remove it",
    )
