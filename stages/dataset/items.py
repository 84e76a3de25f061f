"""From a folder to training items: one for each picture, resolution and caption, keyed by content and never by name.

Every picture and caption is looked at even when some are bad, so one run lists all faults; the good ones come back
whole, and the caller decides what a fault means.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from schemas.base import Strict
from schemas.errors import Fault, RejectedInput, printable
from schemas.validate import Validate
from stages.contract.digests import digest_of
from stages.dataset.buckets import choose, fills, shape_fault
from stages.dataset.captions import TRIGGER, Captions, caption_id, read_captions, with_trigger
from stages.dataset.discover import Discovery, discover
from stages.dataset.pixels import Inspected, inspect, plan
from stages.dataset.statistics import Statistics, histogram, spread

# Pictures handed to the threads at a time: bounds memory and how long Ctrl-C waits.
WINDOW = 256
MAX_THREADS = 4


class Item(Strict, frozen=True):
    """One row of the dataset table. `background` is "" for an opaque picture; `ordinal` counts exact duplicates."""

    item_id: str
    path: str
    image_sha256: str
    width: int
    height: int
    bucket_width: int
    bucket_height: int
    crop: tuple[int, int, int, int]
    caption_id: str
    background: str
    ordinal: int


class Dataset(Strict, frozen=True):
    """Items and captions (after the trigger) sorted by id, faults by file, and all there is to say about the rest."""

    items: list[Item]
    captions: dict[str, str]
    faults: list[Fault]
    warnings: list[str]
    statistics: Statistics


def build_items(folder: Path, config: Validate, text_length: int, on_progress: Callable[[int, int], None]) -> Dataset:
    """Return the items of a folder and all its faults.

    `text_length` is the model's number of text tokens (a tie-break between buckets); `on_progress(done, total)` is
    called from this thread. Raises BadConfig when the folder does not exist.
    """
    found = discover(folder)
    captions = read_captions(folder, found, allow_empty=config.allow_empty_captions)
    faults = [*found.faults, *captions.faults]
    if not found.pictures and not found.refused:
        faults.append(_empty_fault(found))
    good: dict[str, Inspected] = {}
    for picture, outcome in _look_at_all(folder, found.pictures, config.max_megapixels, on_progress):
        fault = outcome if isinstance(outcome, Fault) else shape_fault(picture, outcome.width, outcome.height)
        if fault is None and not isinstance(outcome, Fault):
            good[picture] = outcome
        elif fault is not None:
            faults.append(fault)
    texts, trigger_faults = _triggered(captions, config.trigger)
    accepted = {picture: seen for picture, seen in good.items() if picture in texts}
    items = _items_of(accepted, texts, config, text_length)
    return Dataset(
        items=items,
        captions=dict(sorted((caption_id(texts[picture]), texts[picture]) for picture in accepted)),
        faults=sorted([*faults, *trigger_faults], key=lambda fault: (fault.where, fault.code)),
        # File names go to a terminal from here.
        warnings=[printable(line) for line in [*captions.warnings, *_warnings(accepted, texts, config)]],
        statistics=_measure(found, accepted, texts, items, config),
    )


def _look_at_all(
    folder: Path, pictures: Sequence[str], max_megapixels: float, on_progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Inspected | Fault]]:
    def look(picture: str) -> Inspected | Fault:
        try:
            return inspect(folder / picture, picture, max_megapixels)
        except RejectedInput as error:
            return error.faults[0]

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    # Set here because filters are shared by all threads; what Pillow warns of is noted or rejected by `inspect`.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.filterwarnings("ignore", module="PIL")
        for start in range(0, len(pictures), WINDOW):
            window = pictures[start : start + WINDOW]
            for done, outcome in enumerate(pool.map(look, window), start + 1):
                yield pictures[done - 1], outcome
                on_progress(done, len(pictures))


def _triggered(captions: Captions, trigger: str) -> tuple[dict[str, str], list[Fault]]:
    texts: dict[str, str] = {}
    faults: list[Fault] = []
    for picture, text in captions.texts.items():
        if TRIGGER in text and not trigger:
            faults.append(
                Fault(
                    code="caption.no_trigger",
                    what=f"the caption holds {TRIGGER} but no trigger is set",
                    where=picture,
                    fix='set validate.trigger = "your_word"',
                )
            )
        else:
            texts[picture] = with_trigger(text, trigger)
    return texts, faults


def _items_of(
    accepted: dict[str, Inspected], texts: dict[str, str], config: Validate, text_length: int
) -> list[Item]:
    seen: Counter[str] = Counter()
    items: list[Item] = []
    for path, picture in accepted.items():
        caption = caption_id(texts[path])
        background = config.background.lower() if picture.transparent else ""
        for bucket in choose(
            picture.width, picture.height, config.resolutions, upscale=config.upscale, text_length=text_length
        ):
            content = [picture.image_sha256, plan(bucket.crop, (bucket.width, bucket.height), background), caption]
            ordinal = seen[digest := digest_of("item", content)]
            seen[digest] += 1
            items.append(
                Item(
                    item_id=digest_of("item", [*content, ordinal])[:32],
                    path=path,
                    image_sha256=picture.image_sha256,
                    width=picture.width,
                    height=picture.height,
                    bucket_width=bucket.width,
                    bucket_height=bucket.height,
                    crop=bucket.crop,
                    caption_id=caption,
                    background=background,
                    ordinal=ordinal,
                )
            )
    return sorted(items, key=lambda item: item.item_id)


def _warnings(accepted: dict[str, Inspected], texts: dict[str, str], config: Validate) -> list[str]:
    lines: list[str] = []
    noted: dict[str, list[str]] = defaultdict(list)
    twins: dict[str, list[str]] = defaultdict(list)
    for path, picture in accepted.items():
        twins[picture.image_sha256].append(path)
        for note in picture.notes:
            noted[note].append(path)
        if not config.upscale and not _filled(picture, config):
            noted["is smaller than every resolution and trains at its own size"].append(path)
    for paths in twins.values():
        if len(paths) > 1:
            same = len({texts[path] for path in paths}) == 1
            lines.append(f"{' and '.join(paths)} are the same picture{'' if same else ' with different captions'}")
    for note, paths in noted.items():
        others = "" if len(paths) == 1 else f" (and {len(paths) - 1} more)"
        lines.append(f"{paths[0]}{others} {note}")
    return lines


def _filled(picture: Inspected, config: Validate) -> list[int]:
    return [size for size in config.resolutions if fills(picture.width, picture.height, size)]


def _measure(
    found: Discovery, accepted: dict[str, Inspected], texts: dict[str, str], items: list[Item], config: Validate
) -> Statistics:
    filled = [len(_filled(picture, config)) for picture in accepted.values()]
    captions = {texts[path] for path in accepted}
    images = len(found.pictures) + len(found.refused)
    return Statistics(
        images=images,
        accepted=len(accepted),
        rejected=images - len(accepted),
        ignored_files=found.ignored,
        items=len(items),
        captions=len(captions),
        caption_characters=spread(len(texts[path]) for path in accepted),
        caption_words=spread(len(texts[path].split()) for path in accepted),
        widths_px=spread(picture.width for picture in accepted.values()),
        heights_px=spread(picture.height for picture in accepted.values()),
        megapixels_total=round(sum(picture.width * picture.height for picture in accepted.values()) / 1e6, 3),
        buckets=histogram([(item.bucket_width, item.bucket_height) for item in items]),
        small=sum(count < len(config.resolutions) for count in filled),
        own_size=sum(count == 0 for count in filled) if not config.upscale else 0,
        transparent=sum(picture.transparent for picture in accepted.values()),
        duplicates=len(accepted) - len({picture.image_sha256 for picture in accepted.values()}),
    )


def _empty_fault(found: Discovery) -> Fault:
    return Fault(
        code="dataset.empty",
        what="the dataset holds no picture",
        why=f"{found.ignored} other files ignored",
        fix="put .jpg, .png or .webp pictures with .txt captions into the folder of validate.dataset",
    )
