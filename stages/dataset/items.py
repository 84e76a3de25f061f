"""From a folder to training items: one per picture, resolution and caption variant, keyed by content, never by name.

Every picture and caption is looked at even when some are bad, so one run lists all faults; the good ones come back
whole, and the caller decides what a fault means.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from schemas.base import Strict
from schemas.errors import BadConfig, Fault, printable
from schemas.validate import Repeat, Validate
from stages.contract.digests import digest_of
from stages.dataset.buckets import Bucket, choose, fills, shape_fault
from stages.dataset.captions import TRIGGER, Captions, caption_id, read_captions, with_trigger
from stages.dataset.discover import Discovery, discover
from stages.dataset.draws import Draw
from stages.dataset.inspections import ANEW, Look
from stages.dataset.masks import Mask, find_masks
from stages.dataset.pixels import Inspected, plan
from stages.dataset.statistics import Statistics, histogram, spread
from stages.dataset.tags import tag_variants


class Item(Strict, frozen=True):
    """One row of the dataset table and how it is drawn.

    `background` is "" for an opaque picture; `ordinal` counts exact duplicates.
    """

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
    draw: Draw


@dataclass(frozen=True)
class _Picture:
    """A good picture: its caption variants after the trigger, how often and as what it comes, the mask it has."""

    path: str
    seen: Inspected
    texts: tuple[str, ...]
    times: int = 1
    prior: bool = False
    mask: Mask = field(default_factory=Mask)


@dataclass(frozen=True)
class _Survey:
    """What one folder holds."""

    found: Discovery
    pictures: list[_Picture]
    faults: list[Fault]
    warnings: list[str]


class Dataset(Strict, frozen=True):
    """Items and captions (after the trigger) sorted by id, faults by file, and all there is to say about the rest."""

    items: list[Item]
    captions: dict[str, str]
    faults: list[Fault]
    warnings: list[str]
    statistics: Statistics


def build_items(
    folder: Path,
    config: Validate,
    text_length: int,
    on_progress: Callable[[int, int], None],
    class_folder: Path | None = None,
    *,
    look: Look = ANEW,
) -> Dataset:
    """Return the items of a folder and all its faults; pictures in `class_folder` are of the class.

    `look` says how pictures are looked at; with a glance the items are the same, but damage in the pixels is not
    found.

    `text_length` is the model's number of text tokens (a tie-break between buckets); `on_progress(done, total)` is
    called from this thread. Raises BadConfig when the folder does not exist, or a pattern of repeats matches nothing.
    """
    surveys = [_survey(folder, config, on_progress, look)]
    if class_folder is not None:
        before = len(surveys[0].found.pictures)
        surveys.append(
            _class_survey(
                folder,
                class_folder,
                config,
                lambda done, total: on_progress(before + done, before + total),
                look,
            )
        )
    accepted = [picture for survey in surveys for picture in survey.pictures]
    items = _items_of(accepted, config, text_length)
    told = [line for survey in surveys for line in survey.warnings]
    return Dataset(
        items=items,
        captions=dict(sorted((caption_id(text), text) for picture in accepted for text in picture.texts)),
        faults=sorted(
            (fault for survey in surveys for fault in survey.faults), key=lambda fault: (fault.where, fault.code)
        ),
        # File names go to a terminal from here.
        warnings=[printable(line) for line in [*told, *_warnings(accepted, config)]],
        statistics=_measure([survey.found for survey in surveys], accepted, items, config),
    )


def _survey(folder: Path, config: Validate, on_progress: Callable[[int, int], None], look: Look) -> _Survey:
    found = discover(folder, masks=config.masks == "files")
    times = _times(found.pictures, config.repeats)
    lines = config.captions == "lines"
    captions = read_captions(folder, found, allow_empty=config.allow_empty_captions, lines=lines)
    faults = [*found.faults, *captions.faults]
    if not found.pictures and not found.refused:
        faults.append(_empty_fault(found))
    good: dict[str, Inspected] = {}
    outcomes = look.inspect(folder, found.pictures, config.max_megapixels)
    for done, (picture, outcome) in enumerate(zip(found.pictures, outcomes, strict=True), 1):
        fault = outcome if isinstance(outcome, Fault) else shape_fault(picture, outcome.width, outcome.height)
        if fault is None and not isinstance(outcome, Fault):
            good[picture] = outcome
        elif fault is not None:
            faults.append(fault)
        on_progress(done, len(found.pictures))
    texts, trigger_faults = _triggered(captions, config)
    masks, mask_faults = find_masks(folder, found.masks, good, config, look)
    accepted = [
        _Picture(path, seen, texts[path], times[path], mask=masks[path])
        for path, seen in good.items()
        if path in texts and path in masks
    ]
    return _Survey(found, accepted, [*faults, *trigger_faults, *mask_faults], captions.warnings)


def _class_survey(
    folder: Path, class_folder: Path, config: Validate, on_progress: Callable[[int, int], None], look: Look
) -> _Survey:
    """Return what the folder of the class holds, its files named relative to the dataset."""
    plain = msgspec.structs.replace(config, trigger="", repeats=(), masks=None)
    survey = _survey(class_folder, plain, on_progress, look)
    beside = Path(os.path.relpath(class_folder.resolve(), folder.resolve())).as_posix()
    return _Survey(
        survey.found,
        [replace(picture, path=f"{beside}/{picture.path}", prior=True) for picture in survey.pictures],
        [_of_class(fault, beside) for fault in survey.faults],
        [f"{beside}: {line}" for line in survey.warnings],
    )


def _of_class(fault: Fault, beside: str) -> Fault:
    fix = fault.fix.replace("validate.dataset", "validate.class_dataset")
    moved = msgspec.structs.replace(fault, where=f"{beside}/{fault.where}", fix=fix)
    if fault.code != "caption.no_trigger":
        return moved
    what, fix = f"a class picture's caption holds {TRIGGER}", "write the word for the class instead"
    return msgspec.structs.replace(moved, what=what, fix=fix)


def _times(pictures: Sequence[str], repeats: Sequence[Repeat]) -> dict[str, int]:
    """Return how often each picture comes. Raises BadConfig for patterns that match none."""
    idle = [each.pattern for each in repeats if not any(fnmatchcase(name, each.pattern) for name in pictures)]
    if idle:
        raise BadConfig.of(
            Fault(
                code="dataset.repeats",
                what="a pattern of validate.repeats matches no picture",
                where=pattern,
                fix="write paths relative to the dataset, such as *.png or faces/*",
            )
            for pattern in idle
        )
    times = dict.fromkeys(pictures, 1)
    for each in repeats:
        times |= {name: each.times for name in pictures if fnmatchcase(name, each.pattern)}
    return times


def _triggered(captions: Captions, config: Validate) -> tuple[dict[str, tuple[str, ...]], list[Fault]]:
    """Return the caption variants that train, and a fault for each picture whose captions lack a trigger."""
    trigger = config.trigger
    texts: dict[str, tuple[str, ...]] = {}
    faults: list[Fault] = []
    for picture, written in captions.texts.items():
        if not trigger and any(TRIGGER in text for text in written):
            faults.append(
                Fault(
                    code="caption.no_trigger",
                    what=f"the caption holds {TRIGGER} but no trigger is set",
                    where=picture,
                    fix='set validate.trigger = "your_word"',
                )
            )
        else:
            variants = [
                tag_variants(text, config.tags, trigger) if config.tags is not None else (text,) for text in written
            ]
            texts[picture] = tuple(dict.fromkeys(with_trigger(text, trigger) for each in variants for text in each))
    return texts, faults


def _items_of(accepted: Sequence[_Picture], config: Validate, text_length: int) -> list[Item]:
    ordinals: Counter[str] = Counter()
    items: list[Item] = []
    for picture in accepted:
        seen = picture.seen
        for bucket in choose(
            seen.width, seen.height, config.resolutions, upscale=config.upscale, text_length=text_length
        ):
            items += _variants_of(picture, bucket, config, ordinals)
    return sorted(items, key=lambda item: item.item_id)


def _variants_of(picture: _Picture, bucket: Bucket, config: Validate, ordinals: Counter[str]) -> list[Item]:
    """Return the items of a picture in one bucket, one for each caption variant; `ordinals` counts duplicates."""
    seen = picture.seen
    background = config.background.lower() if seen.transparent else ""
    steps = plan(bucket.crop, (bucket.width, bucket.height), background)
    named: list[tuple[str, str, int]] = []
    for caption in map(caption_id, picture.texts):
        content = [seen.image_sha256, steps, caption]
        ordinal = ordinals[digest := digest_of("item", content)]
        ordinals[digest] += 1
        named.append((digest_of("item", [*content, ordinal])[:32], caption, ordinal))
    first = min(item_id for item_id, _, _ in named)
    return [
        Item(
            item_id=item_id,
            path=picture.path,
            image_sha256=seen.image_sha256,
            width=seen.width,
            height=seen.height,
            bucket_width=bucket.width,
            bucket_height=bucket.height,
            crop=bucket.crop,
            caption_id=caption,
            background=background,
            ordinal=ordinal,
            draw=Draw(
                item_id=item_id,
                picture=first,
                times=picture.times,
                prior=picture.prior,
                mask_path=picture.mask.path,
                mask_sha256=picture.mask.sha256,
            ),
        )
        for item_id, caption, ordinal in named
    ]


def _warnings(accepted: Sequence[_Picture], config: Validate) -> list[str]:
    lines: list[str] = []
    noted: dict[str, list[str]] = defaultdict(list)
    twins: dict[str, list[_Picture]] = defaultdict(list)
    for picture in accepted:
        twins[picture.seen.image_sha256].append(picture)
        for note in picture.seen.notes:
            noted[note].append(picture.path)
        if config.masks is not None and not picture.mask.path and not picture.prior:
            noted["has no mask: all of it counts"].append(picture.path)
        if not config.upscale and not _filled(picture.seen, config):
            noted["is smaller than every resolution and trains at its own size"].append(picture.path)
    for same in twins.values():
        if len(same) > 1:
            other = "" if len({picture.texts for picture in same}) == 1 else " with different captions"
            lines.append(f"{' and '.join(picture.path for picture in same)} are the same picture{other}")
    for note, paths in noted.items():
        others = "" if len(paths) == 1 else f" (and {len(paths) - 1} more)"
        lines.append(f"{paths[0]}{others} {note}")
    return lines


def _filled(picture: Inspected, config: Validate) -> list[int]:
    return [size for size in config.resolutions if fills(picture.width, picture.height, size)]


def _measure(
    found: Sequence[Discovery], accepted: Sequence[_Picture], items: Sequence[Item], config: Validate
) -> Statistics:
    pictures = [picture.seen for picture in accepted]
    texts = [text for picture in accepted for text in picture.texts]
    filled = [len(_filled(picture, config)) for picture in pictures]
    images = sum(len(each.pictures) + len(each.refused) for each in found)
    return Statistics(
        images=images,
        accepted=len(accepted),
        rejected=images - len(accepted),
        ignored_files=sum(each.ignored for each in found),
        items=len(items),
        captions=len(set(texts)),
        caption_characters=spread(len(text) for text in texts),
        caption_words=spread(len(text.split()) for text in texts),
        widths_px=spread(picture.width for picture in pictures),
        heights_px=spread(picture.height for picture in pictures),
        megapixels_total=round(sum(picture.width * picture.height for picture in pictures) / 1e6, 3),
        buckets=histogram([(item.bucket_width, item.bucket_height) for item in items]),
        small=sum(count < len(config.resolutions) for count in filled),
        own_size=sum(count == 0 for count in filled) if not config.upscale else 0,
        transparent=sum(picture.transparent for picture in pictures),
        duplicates=len(pictures) - len({picture.image_sha256 for picture in pictures}),
    )


def _empty_fault(found: Discovery) -> Fault:
    return Fault(
        code="dataset.empty",
        what="the dataset holds no picture",
        why=f"{found.ignored} other files ignored",
        fix="put .jpg, .png or .webp pictures with .txt captions into the folder of validate.dataset",
    )
