"""8-bit floats as ComfyUI and BFL publish them: a matrix of e4m3 numbers, and one float32 factor for all of them.

A number is sign, 4 bits of exponent (bias 7), 3 of mantissa; there is no infinity, all ones is no number (the OCP's
8-bit floating point specification, E4M3). Every product with the factor is a float32 rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from stages.stores.tensors import Entry

DTYPE = "F8_E4M3"
WEIGHT = ".weight"
# Two spellings of the factor's name; what else lies beside a matrix is for products in 8 bits.
FACTORS = (".weight_scale", ".scale_weight")
BESIDE = (*FACTORS, ".input_scale", ".scale_input", ".comfy_quant")
MARKER = "scaled_fp8"


def values() -> np.ndarray:
    """Return the numbers [256] float32 that the 256 codes stand for."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3 & 15), (codes & 7) / 8
    sizes = np.where(exponents > 0, 1 + mantissas, mantissas) * 2.0 ** (np.maximum(exponents, 1) - 7)
    sizes[codes & 127 == 127] = math.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


def factor_of(name: str, entries: Mapping[str, Entry]) -> str | None:
    """Return the name of a matrix's factor, a single float32; None where it has none."""
    names = [name.removesuffix(WEIGHT) + suffix for suffix in FACTORS]
    single = [each for each in names if each in entries and entries[each].dtype == "F32"]
    return next((each for each in single if math.prod(entries[each].shape) == 1), None)


def beside(name: str) -> set[str]:
    """Return the names of all that may lie beside a matrix."""
    return {name.removesuffix(WEIGHT) + suffix for suffix in BESIDE}


def readable(entries: Mapping[str, Entry]) -> set[str]:
    """Return the names of the matrices that have a factor, and of what lies beside them."""
    matrices = {
        name
        for name, entry in entries.items()
        if entry.dtype == DTYPE and name.endswith(WEIGHT) and factor_of(name, entries)
    }
    return matrices.union({MARKER}, *(beside(name) for name in matrices)) if matrices else set()
