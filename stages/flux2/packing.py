"""Quantized matrices as arithmetic: formats, which matrices are worth it, and how many bytes they take.

A matrix [out, in] in a format is three tensors named as MLX names them: `weight`, uint32 words that hold `bits` of
each number, `scales` [out, in / group] and, in affine formats, `biases` as large. Nothing heavy is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from schemas.errors import BadConfig
from schemas.quantize import Quantize

WORD_BITS = 32
WORDS = "U32"
AFFINE = "affine"
# What MLX packs affinely. Its floats come in one width and group each.
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOAT_SCALES = ("BF16", "F16", "F32")
# Of an affine scale and bias: quantized from bfloat16, matrices keep that type on every backend.
AFFINE_SCALE_BYTES = 2
# The linears inside blocks and layers are 95 % (klein 4B) to 98 % (dev) of a model. What stands outside stays as it
# is: token embeddings, the first and last projections and the shared modulation reach every token of every block, so
# that their errors never average out. Norms are not matrices.
WORTH_IT = re.compile(r"(?:double_blocks|single_blocks|model\.layers)\.\d+\.")

Shapes = Mapping[str, tuple[int, ...]]


class Format(NamedTuple):
    """MLX's name of the mode, bits of a number, and how many neighbours share a scale."""

    mode: str
    bits: int
    group_size: int

    def __str__(self) -> str:
        named = [name for name, each in FORMATS.items() if each == self]
        return named[0] if named else f"{self.mode}, {self.bits} bits, groups of {self.group_size}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of a matrix's tensors."""
        return ("weight", "scales", "biases") if self.mode == AFFINE else ("weight", "scales")

    def tensors(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Return shape and possible types, as files say them, of the tensors of a matrix of `shape`, by part."""
        rows, columns = shape
        groups = (rows, columns // self.group_size), FLOAT_SCALES if self.mode == AFFINE else ("U8",)
        words = (rows, columns * self.bits // WORD_BITS), (WORDS,)
        return {part: words if part == "weight" else groups for part in self.parts}

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a matrix takes."""
        scale = 2 * AFFINE_SCALE_BYTES if self.mode == AFFINE else 1
        return math.prod(shape) * self.bits // 8 + math.prod(shape) // self.group_size * scale


FORMATS: dict[Quantize, Format] = {
    "8bit": Format(AFFINE, 8, 64),
    "4bit": Format(AFFINE, 4, 64),
    "mxfp8": Format("mxfp8", 8, 32),
    "mxfp4": Format("mxfp4", 4, 32),
    "nvfp4": Format("nvfp4", 4, 16),
}


def is_packed(name: str, shape: tuple[int, ...], form: Format) -> bool:
    """Return whether the tensor of that name is held in `form`: a matrix worth it, whose rows are whole groups."""
    return len(shape) == 2 and WORTH_IT.match(name) is not None and shape[1] % form.group_size == 0


def packed_modules(shapes: Shapes, quantize: Quantize) -> dict[str, Format]:
    """Return the modules that are held in the format `quantize` names; empty for "none"."""
    form = FORMATS.get(quantize)
    if form is None:
        return {}
    return {name.removesuffix(".weight"): form for name, shape in shapes.items() if is_packed(name, shape, form)}


def chosen(shapes: Shapes, found: Mapping[str, Format], quantize: Quantize, setting: str) -> dict[str, Format]:
    """Return the modules to hold packed: those `found` packed in the files stay so, others as `quantize` says.

    Raises BadConfig, about `setting`, for a format that the files are not in or that fits no matrix of the model.
    """
    kept = {name: form for name, form in found.items() if is_packed(f"{name}.weight", shapes[f"{name}.weight"], form)}
    asked = packed_modules(shapes, quantize)
    if quantize == "none" or (asked and set(kept.values()) <= {FORMATS[quantize]}):
        return asked | kept
    if not asked:
        raise BadConfig(
            "model.not_quantizable",
            f"no matrix of this model can be held as {quantize}",
            where=f"{setting} = {quantize}",
            why=f"no row is a multiple of {FORMATS[quantize].group_size} numbers long",
            fix=f'set {setting} = "none"',
        )
    raise BadConfig(
        "model.quantized_already",
        "the files hold weights that are quantized already",
        where=f"{setting} = {quantize}",
        why=f"found {' and '.join(sorted({str(form) for form in kept.values()}))}",
        fix=f'set {setting} = "none" to train on them as they are, or use the files of the full model',
    )


def bytes_of(shapes: Shapes, packed: Mapping[str, Format], element_bytes: int) -> int:
    """Return the bytes of a model's weights; those of modules not `packed` have `element_bytes` each."""
    return sum(
        packed[module].bytes_of(shape)
        if (module := name.removesuffix(".weight")) in packed
        else math.prod(shape) * element_bytes
        for name, shape in shapes.items()
    )


def largest_packed(shapes: Shapes, packed: Mapping[str, Format]) -> int:
    """Return the numbers of the largest packed matrix, which is unpacked whole to be multiplied with; 0 if none."""
    return max((math.prod(shapes[f"{module}.weight"]) for module in packed), default=0)


def recognise(columns: int, words: int, scales: tuple[str, int], *, biases: bool) -> Format | None:
    """Return the format of a packed matrix of `columns` numbers a row; None for what MLX does not pack.

    `words` are the uint32 columns of its weight, `scales` the type (as files say it) and columns of its scales.
    """
    dtype, groups = scales
    if not groups or columns % groups or words * WORD_BITS % columns:
        return None
    bits, size = words * WORD_BITS // columns, columns // groups
    if dtype in FLOAT_SCALES and biases:
        return Format(AFFINE, bits, size) if bits in AFFINE_BITS and size in AFFINE_GROUPS else None
    floats = {(form.bits, form.group_size): form for form in FORMATS.values() if form.mode != AFFINE}
    return floats.get((bits, size)) if dtype == "U8" and not biases else None
