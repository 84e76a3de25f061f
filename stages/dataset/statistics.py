"""What a person wants to know about a dataset before training on it, as one plain struct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from schemas.base import Strict


class Spread(Strict, frozen=True):
    """Smallest, middle and largest of some numbers; zeros for none."""

    minimum: int = 0
    median: float = 0.0
    maximum: int = 0


class Statistics(Strict, frozen=True):
    """Counts over the accepted pictures unless the name says otherwise.

    `images` counts everything that looks like a picture; `small` those that miss at least one resolution because they
    are never enlarged, `own_size` those that miss all and train at their own size.
    """

    images: int
    accepted: int
    rejected: int
    ignored_files: int
    items: int
    captions: int
    caption_characters: Spread
    caption_words: Spread
    widths_px: Spread
    heights_px: Spread
    megapixels_total: float
    buckets: dict[str, int]
    small: int
    own_size: int
    transparent: int
    duplicates: int


def spread(values: Iterable[int]) -> Spread:
    """Return the spread of some numbers."""
    numbers = list(values)
    if not numbers:
        return Spread()
    return Spread(minimum=min(numbers), median=float(median(numbers)), maximum=max(numbers))


def histogram(shapes: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Return how many items each bucket holds, `"512x768"` (width x height) to count, largest count first."""
    counted = sorted(Counter(shapes).items(), key=lambda entry: (-entry[1], entry[0]))
    return {f"{width}x{height}": count for (width, height), count in counted}
