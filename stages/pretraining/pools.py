"""Which pictures of which size a step sees, and how many steps there is time for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.pretrain import Pool


class Schedule:
    """A random order of pools by their shares, and of pictures within them; a function of the seed alone."""

    def __init__(self, pools: Sequence[Pool], seed: int) -> None:
        self._pools = pools
        self._shares = np.array([pool.share for pool in pools]) / sum(pool.share for pool in pools)
        self._seed = seed

    def pool(self, step: int) -> int:
        """Return the index of the pool that a step sees."""
        return int(np.random.default_rng((self._seed, step, 0)).choice(len(self._pools), p=self._shares))

    def rows(self, step: int, pool: int) -> np.ndarray:
        """Return the pictures [B] int32 of that pool that a step sees."""
        own = self._pools[pool]
        return np.random.default_rng((self._seed, step, 1)).integers(own.count, size=own.batch_size, dtype=np.int32)

    def chance(self, step: int, count: int) -> np.ndarray:
        """Return numbers in 0..1 for each picture of a step."""
        return np.random.default_rng((self._seed, step, 2)).random(count)


def name_of(pool: Pool) -> str:
    """Return the size of a pool's pictures as text."""
    return f"{pool.width}x{pool.height}"


def planned_steps(asked: int, ceiling_seconds: float, pools: Sequence[Pool], seconds: Sequence[float]) -> int:
    """Return the steps there is time for, at most `asked`; `seconds` are those of a step on each pool."""
    shares = [pool.share for pool in pools]
    mean = sum(share * each for share, each in zip(shares, seconds, strict=True)) / sum(shares)
    return max(1, min(asked, int(ceiling_seconds / mean)))
