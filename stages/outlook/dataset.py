"""What differs between two looks at a dataset, in the words of its files: pictures, captions, masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.dataset.discover import discover, stem_of

# What of the dataset a reader depends on; None is all of it.
Role = Literal["pictures", "captions", "items", "masks"] | None
Changed = tuple[Literal["picture", "caption", "mask"], str, str, str]
SHORT_DIGEST = 12
SHORT_TEXT = 60


@dataclass(frozen=True)
class _Seen:
    """What tables say of one picture."""

    sha256: str
    captions: tuple[str, ...]
    mask: str


def dataset_changes(dataset: Path, before: Path, now: Path, role: Role) -> Iterator[Changed]:
    """Yield (kind, file, old, new) of what changed between the tables in two folders. Raises Damaged."""
    old, new = _seen(before), _seen(now)
    gone, come = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    moved = _moved({path: old[path] for path in gone}, {path: new[path] for path in come})
    for source, target in moved.items() if role is None else ():
        yield "picture", source, source, target
    for path in gone:
        if path not in moved:
            yield "picture", path, "there", "refused" if (dataset / path).exists() else "removed"
    for path in come:
        if path not in moved.values():
            yield "picture", path, "not there", "added"
    files = _sidecars(dataset)
    for path in sorted(old.keys() & new.keys() | moved.keys()):
        after = moved.get(path, path)
        if role != "captions" and old[path].sha256 != new[after].sha256:
            yield "picture", after, old[path].sha256[:SHORT_DIGEST], new[after].sha256[:SHORT_DIGEST]
        if role != "masks" and old[path].captions != new[after].captions:
            yield "caption", files.get(stem_of(after), after), _text(old[path].captions), _text(new[after].captions)
        if role in (None, "masks", "items") and old[path].mask != new[after].mask:
            yield "mask", f"the mask of {after}", _digest(old[path].mask), _digest(new[after].mask)


def _seen(folder: Path) -> dict[str, _Seen]:
    from schemas.tables import CAPTIONS, DATASET, DRAWS
    from stages.stores.tables import read_table

    rows = read_table(folder / DATASET.name, DATASET)
    texts = {row["caption_id"]: row["text"] for row in read_table(folder / CAPTIONS.name, CAPTIONS)}
    drawn = read_table(folder / DRAWS.name, DRAWS) if (folder / DRAWS.name).is_file() else []
    masks = {row["item_id"]: row["mask_sha256"] for row in drawn}
    by_path: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_path[row["path"]].append(row)
    return {
        path: _Seen(
            same[0]["image_sha256"],
            tuple(sorted({texts.get(row["caption_id"], "") for row in same})),
            masks.get(same[0]["item_id"], ""),
        )
        for path, same in by_path.items()
    }


def _moved(gone: Mapping[str, _Seen], come: Mapping[str, _Seen]) -> dict[str, str]:
    """Return the pictures that have another name now, by the name they had."""
    waiting: dict[str, list[str]] = defaultdict(list)
    for path, seen in come.items():
        waiting[seen.sha256].append(path)
    return {path: waiting[seen.sha256].pop(0) for path, seen in gone.items() if waiting[seen.sha256]}


def _sidecars(dataset: Path) -> dict[str, str]:
    """Return caption files by the stem that they share with a picture."""
    return {stem_of(name): name for name in discover(dataset).captions}


def _text(captions: Sequence[str]) -> str:
    text = " | ".join(captions)
    return f'"{text if len(text) <= SHORT_TEXT else text[: SHORT_TEXT - 3] + "..."}"'


def _digest(sha256: str) -> str:
    return sha256[:SHORT_DIGEST] or "none"
