"""Variants of captions that are lists of tags: the same for ever for one (seed, caption, number of the variant)."""

from __future__ import annotations

from schemas.validate import Tags
from stages.contract.digests import digest_of
from stages.dataset.captions import holds_trigger


def tag_variants(text: str, tags: Tags, trigger: str) -> tuple[str, ...]:
    """Return the different variants of a caption before the trigger goes in.

    A tag that holds the trigger is never left out, and neither are all tags.
    """
    listed = [tag for each in text.split(tags.separator) if (tag := each.strip())]
    return tuple(dict.fromkeys(_variant(text, listed, tags, trigger, number) for number in range(tags.variants)))


def _variant(text: str, listed: list[str], tags: Tags, trigger: str, number: int) -> str:
    def draw(purpose: str, position: int) -> float:
        return int(digest_of("tag", [purpose, tags.seed, text, number, position])[:13], 16) / 2**52

    first, rest = listed[: tags.keep_first], list(enumerate(listed))[tags.keep_first :]
    left = [(place, tag) for place, tag in rest if holds_trigger(tag, trigger) or draw("drop", place) >= tags.dropout]
    if rest and not left and not first:
        left = [max(rest, key=lambda each: draw("drop", each[0]))]
    if tags.shuffle:
        left.sort(key=lambda each: draw("place", each[0]))
    joint = tags.separator if tags.separator[-1].isspace() else f"{tags.separator} "
    return joint.join([*first, *(tag for _, tag in left)])
