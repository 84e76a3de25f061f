"""Frozen linears in fewer bits: packed matrix by matrix while they are read, unpacked where they are multiplied with.

Where MLX's quantized kernel is slow (CUDA, CPU) the matrix is unpacked for each product and again in the backward
pass, so that one at a time exists besides the packed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from stages.flux2.packing import WORD_BITS, Format

Module = TypeVar("Module", bound=nn.Module)
# Numbers packed at once: on the CPU MLX takes up to 77 bytes for each of them (nvfp4, 0.32.4) while it packs.
BLOCK_NUMBERS = 1 << 18
# What packed numbers and the scales of floats are stored in; affine scales are floats themselves.
WORDS = (mx.uint32, mx.uint8)


class FrozenLinear(nn.QuantizedLinear):
    """y = W x with a packed W [out, in] and no bias. W gets no gradient, x gets the right one."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., in] to [..., out] in the type of x."""
        # Measured at 1536 tokens on one H200, mlx 0.32.4: the kernel takes 2 to 5 times as long as unpacking and
        # multiplying; on two CPU cores 60 times. Metal is not measured; its kernel unpacks inside.
        return super().__call__(x) if _has_fast_kernel() else _product(self, x)

    @property
    def form(self) -> Format:
        """How W is packed."""
        return Format(self.mode, self.bits, self.group_size)

    def unpacked(self, dtype: mx.Dtype, after: mx.array) -> mx.array:
        """Return W [out, in], not before `after` has been computed: else all of a model's may be alive at once."""
        return unpacked(mx.depends([self[part] for part in self.form.parts], [after]), self.form, dtype)


def _product(linear: FrozenLinear, x: mx.array) -> mx.array:
    # Left to itself the gradient would keep every unpacked W from the forward pass: the whole dense model.
    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return x @ linear.unpacked(x.dtype, x).T

    @forward.vjp
    def backward(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return cotangent @ linear.unpacked(cotangent.dtype, cotangent)

    return cast(mx.array, forward(x))


def _has_fast_kernel() -> bool:
    return mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu)


def packed(weight: mx.array, form: Format) -> list[mx.array]:
    """Return weight [out, in] in a format, evaluated: words, scales and, of affine ones, biases.

    From bfloat16, whatever its type: the same numbers, as large, on every backend.
    """
    rows = max(1, BLOCK_NUMBERS // weight.shape[1])
    blocks: list[tuple[mx.array, ...]] = []
    for at in range(0, weight.shape[0], rows):
        block = weight[at : at + rows].astype(mx.bfloat16)
        blocks.append(mx.quantize(block, form.group_size, form.bits, mode=form.mode))
        mx.eval(blocks[-1])
    whole = [mx.concatenate(list(part)) for part in zip(*blocks, strict=True)]
    mx.eval(whole)
    return whole


def unpacked(parts: list[mx.array], form: Format, dtype: mx.Dtype) -> mx.array:
    """Return the matrix [out, in] of packed `parts`."""
    return mx.dequantize(*parts, group_size=form.group_size, bits=form.bits, mode=form.mode, dtype=dtype)


def fill(
    module: Module,
    tensors: Iterable[tuple[str, mx.array]],
    dtype: mx.Dtype,
    *,
    found: Mapping[str, Format],
    wanted: Mapping[str, Format],
) -> Module:
    """Return the module with weights of `dtype`, the modules of `wanted` packed, all evaluated.

    `tensors` are those of the module by name; of the modules `found` they come packed, part by part.
    """
    # The module's own random start is never evaluated, so only the weights take memory.
    _install(module, wanted)
    module.load_weights(list(held(tensors, found, wanted, dtype)), strict=True)
    mx.eval(module.parameters())
    return module


def held(
    tensors: Iterable[tuple[str, mx.array]],
    found: Mapping[str, Format],
    wanted: Mapping[str, Format],
    dtype: mx.Dtype | None,
) -> Iterator[tuple[str, mx.array]]:
    """Yield tensors as a module holds them, evaluated: those of `wanted` packed, others of `dtype` or their own.

    What comes packed and is not wanted so is unpacked.
    """
    waiting: list[mx.array] = []
    for name, array in tensors:
        module, _, part = name.rpartition(".")
        if module in found:
            if module in wanted:
                yield name, _evaluated(array if array.dtype in WORDS else array.astype(mx.bfloat16))
            else:
                waiting.append(array)
                if len(waiting) == len(found[module].parts):
                    yield f"{module}.weight", _opened(waiting, found[module], dtype or mx.bfloat16)
                    waiting = []
        elif module in wanted and part == "weight":
            form = wanted[module]
            yield from zip((f"{module}.{part}" for part in form.parts), packed(array, form), strict=True)
        else:
            yield name, _evaluated(array if dtype is None else array.astype(dtype))
        # Before the next is read: neither this tensor nor the buffers of its size may stay beside it.
        del array
        mx.clear_cache()


def held_as(transformer: nn.Module) -> str:
    """Return in a word how a module's linears are held: "none", the name of a format, or several."""
    linears = [layer for _, layer in transformer.named_modules() if isinstance(layer, FrozenLinear)]
    return " and ".join(sorted({str(linear.form) for linear in linears})) or "none"


def _install(module: nn.Module, wanted: Mapping[str, Format]) -> None:
    """Put a `FrozenLinear`, still without its numbers, in place of each linear that `wanted` names."""

    def frozen(path: str, leaf: nn.Module) -> nn.Module:
        if path not in wanted:
            return leaf
        rows, columns = leaf["weight"].shape
        form = wanted[path]
        return FrozenLinear(columns, rows, bias=False, group_size=form.group_size, bits=form.bits, mode=form.mode)

    module.update_modules(tree_map_with_path(frozen, module.leaf_modules(), is_leaf=nn.Module.is_module))


def _opened(parts: list[mx.array], form: Format, dtype: mx.Dtype) -> mx.array:
    """Return an unpacked matrix, evaluated block by block as it was packed."""
    rows = max(1, BLOCK_NUMBERS * form.bits // (WORD_BITS * parts[0].shape[1]))
    starts = range(0, parts[0].shape[0], rows)
    blocks = [_evaluated(unpacked([part[at : at + rows] for part in parts], form, dtype)) for at in starts]
    return _evaluated(mx.concatenate(blocks))


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
