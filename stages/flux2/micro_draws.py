"""Random weights that are the same bytes on every machine.

Numbers come from PCG64's raw 64-bit stream, which numpy guarantees, not from its normal distribution, which it does
not; each tensor's stream is seeded by its name alone.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

# Four 16-bit integers add up to about a normal number (Irwin-Hall) with exactly this mean and deviation.
SUM_MEAN = 4 * 65535 / 2
SUM_DEVIATION = math.sqrt(4 * (65536**2 - 1) / 12)


def normal(name: str, *shape: int, deviation: float) -> np.ndarray:
    """Return float32 numbers of mean 0 and the given deviation, within 3.5 deviations, for the tensor `name`."""
    stream = np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little"))
    raw = stream.random_raw(math.prod(shape)).astype("<u8").view("<u2").reshape(-1, 4)
    sums = raw.sum(axis=1, dtype=np.int64)
    return ((sums - SUM_MEAN) * (deviation / SUM_DEVIATION)).astype(np.float32).reshape(shape)


def linear(name: str, outputs: int, inputs: int, gain: float = 1.0) -> np.ndarray:
    """Return a weight [outputs, inputs] that maps unit variance to variance `gain` squared."""
    return normal(name, outputs, inputs, deviation=gain / math.sqrt(inputs))


def conv(name: str, outputs: int, inputs: int, size: int, gain: float = 1.0) -> np.ndarray:
    """Return a weight [outputs, inputs, size, size] that maps unit variance to variance `gain` squared."""
    return normal(name, outputs, inputs, size, size, deviation=gain / math.sqrt(inputs * size * size))
