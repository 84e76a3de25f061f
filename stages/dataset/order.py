"""Training order as a pure function of (item ids and buckets, batch size, seed, epoch): a resumed run needs no state.

Every item comes once an epoch. A batch holds one bucket; the last batch of a bucket may be smaller, so nothing is
dropped or repeated. File names play no part, and neither does the order in which the items are given.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

Shape = tuple[int, int]
Visits = Sequence[tuple[str, Shape]]


def batches(items: Visits, batch_size: int, seed: int, epoch: int) -> list[list[str]]:
    """Return one epoch's batches of item ids, shuffled by sha256 of (seed, epoch, item id)."""
    shuffled = sorted(items, key=lambda item: _draw("item", seed, epoch, item[0]))
    by_bucket: dict[Shape, list[str]] = defaultdict(list)
    for item_id, bucket in shuffled:
        by_bucket[bucket].append(item_id)
    filled = [
        ids[start : start + batch_size] for ids in by_bucket.values() for start in range(0, len(ids), batch_size)
    ]
    # Shuffled once more, or one bucket would follow the other and the small batches come last.
    return sorted(filled, key=lambda batch: _draw("batch", seed, epoch, batch[0]))


class BatchOrder:
    """The endless sequence of batches; any place in it can be asked for in any order."""

    def __init__(self, items: Visits, batch_size: int, seed: int) -> None:
        counts = Counter(bucket for _, bucket in items)
        self.batches_per_epoch = sum(-(-count // batch_size) for count in counts.values())
        # Two epochs: what trains and what is fetched ahead.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: batches(items, batch_size, seed, epoch))

    def at(self, micro_step: int) -> list[str]:
        """Return the item ids of the batch at `micro_step`, counted from 0 across epochs."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        return self._epoch(epoch)[index]


class PhasedOrder:
    """Orders over different items one after another; each begins with an epoch of its own."""

    def __init__(self, phases: Sequence[tuple[int, Visits]], batch_size: int, seed: int) -> None:
        """Take the first micro-step and the items of each phase; the first one begins at 0."""
        self._starts = [start for start, _ in phases]
        self._orders = [BatchOrder(items, batch_size, seed) for _, items in phases]

    def at(self, micro_step: int) -> list[str]:
        """Return the item ids of the batch at `micro_step`, counted from 0."""
        phase = bisect_right(self._starts, micro_step) - 1
        return self._orders[phase].at(micro_step - self._starts[phase])


def _draw(kind: str, seed: int, epoch: int, item_id: str) -> bytes:
    return hashlib.sha256(f"{kind}/{seed}/{epoch}/{item_id}".encode()).digest()
