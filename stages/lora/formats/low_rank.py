"""Adapters of two factors in foreign files, LoRA and DoRA: whole, or apart on q, k and v."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import mlx.core as mx

from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place
from stages.lora.layer import Factors, Parts
from stages.lora.targets import linear_shapes

SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "lora_magnitude_vector",
}
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")


def complete(parts: Parts) -> bool:
    """Return whether both halves are there."""
    return {"lora_A", "lora_B"} <= parts.keys()


def wrong_shapes(adapters: Mapping[Place, Parts], config: TransformerConfig) -> Iterator[str]:
    """Yield what does not fit its linear, in words."""
    shapes = linear_shapes(config)
    for place, parts in adapters.items():
        rows, columns = shapes[place.module]
        rows = rows if place.third is None else rows // 3
        a, b = parts["lora_A"], parts["lora_B"]
        rank = a.shape[0] if a.ndim == 2 else 0
        expected = ((rank, columns), (rows, rank))
        alpha = parts.get("alpha")
        if (a.shape, b.shape) != expected or rank == 0 or (alpha is not None and alpha.size != 1):
            yield f"{place} A {a.shape} B {b.shape}, expected A {expected[0]} B {expected[1]}"
        # A magnitude per input, [1, in], is another kind of DoRA.
        for name in MAGNITUDES:
            if name in parts and parts[name].shape not in {(rows,), (rows, 1)}:
                yield f"{place} {name} {parts[name].shape}, expected {(rows, 1)}"


def partial_doras(adapters: Mapping[Place, Parts]) -> Iterator[str]:
    """Yield the linears of which only some thirds have a magnitude: what it is for the rest, no file says."""
    for module, thirds in _by_module(adapters).items():
        kinds = [tuple(name for name in MAGNITUDES if name in parts) for parts in thirds.values()]
        if any(kinds) and None not in thirds and (len(kinds) < 3 or len(set(kinds)) > 1):
            yield module


def factors(adapters: Mapping[Place, Parts], config: TransformerConfig, scale: float) -> Factors:
    """Return float32 factors per linear; `scale` is that of adapters without an alpha of their own."""
    found: Factors = {}
    for module, thirds in _by_module(adapters).items():
        scaled = {third: _scaled(parts, scale) for third, parts in thirds.items()}
        parts = scaled[None] if None in scaled else _fuse(scaled, linear_shapes(config)[module][0] // 3)
        found |= {f"{module}.{name}": part for name, part in parts.items()}
    return found


def _by_module(adapters: Mapping[Place, Parts]) -> dict[str, dict[int | None, Parts]]:
    modules: dict[str, dict[int | None, Parts]] = defaultdict(dict)
    for place, parts in adapters.items():
        modules[place.module][place.third] = parts
    return modules


def _scaled(parts: Parts, scale: float) -> Parts:
    a, b = parts["lora_A"].astype(mx.float32), parts["lora_B"].astype(mx.float32)
    own = parts["alpha"].astype(mx.float32).reshape(()) / a.shape[0] if "alpha" in parts else scale
    rest = {name: parts[name].astype(mx.float32).flatten() for name in MAGNITUDES if name in parts}
    return {"lora_A": a, "lora_B": b * own, **rest}


def _fuse(thirds: Mapping[int | None, Parts], rows: int) -> Parts:
    """Make one adapter of those on q, k and v (some may be absent): B's rows below each other."""
    first = next(iter(thirds.values()))
    ordered = [thirds.get(third) for third in range(3)]
    given = [parts for parts in ordered if parts is not None]
    rest = {name: mx.concatenate([parts[name] for parts in given]) for name in MAGNITUDES if name in first}
    if len(given) == 3 and all(mx.array_equal(parts["lora_A"], first["lora_A"]).item() for parts in given):
        return {"lora_A": first["lora_A"], "lora_B": mx.concatenate([parts["lora_B"] for parts in given]), **rest}
    a = mx.concatenate([parts["lora_A"] for parts in given], axis=0)
    b = mx.zeros((3 * rows, a.shape[0]))
    start = 0
    for third, parts in enumerate(ordered):
        if parts is not None:
            rank = parts["lora_A"].shape[0]
            b[third * rows : (third + 1) * rows, start : start + rank] = parts["lora_B"]
            start += rank
    return {"lora_A": a, "lora_B": b, **rest}
