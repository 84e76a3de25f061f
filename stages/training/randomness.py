"""Every draw of a training run, each a pure function of (seed, step, item, purpose) and of nothing before it.

The four are hashed (sha256), so a resumed run, another order of items or another batch size draws the same numbers
for the same item at the same step. Host draws need no generator at all: the hash is the uniform number, whatever
the version of numpy. Noise on the device comes from MLX's stateless keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

from stages.contract.digests import digest_of

Purpose = Literal["noise", "noise_offset", "timestep", "stratum", "dropout", "flip", "caption"]


def integer(seed: int, step: int, item_id: str, purpose: Purpose) -> int:
    """Return 64 random bits."""
    return int(digest_of("draw", [purpose, seed, step, item_id])[:16], 16)


def uniform(seed: int, step: int, item_id: str, purpose: Purpose) -> float:
    """Return a number strictly between 0 and 1, a multiple of 2^-53."""
    return ((integer(seed, step, item_id, purpose) >> 12) + 0.5) / 2**52


def distinct(item_ids: Sequence[str]) -> list[str]:
    """Return a name per place of one step's window: an item that comes again ("id#1") gets draws of its own."""
    seen: Counter[str] = Counter()
    names = []
    for item_id in item_ids:
        names.append(f"{item_id}#{seen[item_id]}" if seen[item_id] else item_id)
        seen[item_id] += 1
    return names


def noise(
    seed: int, step: int, item_ids: Sequence[str], shape: tuple[int, ...], purpose: Purpose = "noise"
) -> mx.array:
    """Return standard normal noise [B, *shape] float32, a row per item."""
    keys = [mx.random.key(integer(seed, step, item_id, purpose)) for item_id in item_ids]
    return mx.stack([mx.random.normal(shape, key=key) for key in keys])


def dropped(seed: int, step: int, item_ids: Sequence[str], fraction: float) -> list[bool]:
    """Return which items see the empty caption at this step: each with probability `fraction`."""
    return [uniform(seed, step, item_id, "dropout") < fraction for item_id in item_ids]
