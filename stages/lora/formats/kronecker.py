"""LoKr in foreign files: the change is kron(w1, w2), each whole or as two factors, as LyCORIS names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx

from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place
from stages.lora.layer import Factors, Parts
from stages.lora.targets import linear_shapes

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
SUFFIXES = {f".{name}": name for name in NAMES}
WHOLES = ("lokr_w1", "lokr_w2")


def is_kronecker(parts: Parts) -> bool:
    """Return whether any factor of a Kronecker product is there."""
    return any(name in parts for name in NAMES)


def complete(parts: Parts) -> bool:
    """Return whether w1 and w2 are both there, each exactly one way, and nothing that belongs to other kinds."""
    ways = [[{name} <= parts.keys(), {f"{name}_a", f"{name}_b"} <= parts.keys()] for name in WHOLES]
    count = len(parts.keys() - {"alpha"})
    return all(sum(way) == 1 for way in ways) and count == sum(1 if way[0] else 2 for way in ways)


def wrong_shapes(adapters: Mapping[Place, Parts], config: TransformerConfig) -> Iterator[str]:
    """Yield what does not fit its linear, in words."""
    shapes = linear_shapes(config)
    for place, parts in adapters.items():
        sizes = {name: part.shape for name, part in parts.items() if name != "alpha"}
        found = " ".join(f"{name} {size}" for name, size in sizes.items())
        alpha = parts.get("alpha")
        if any(len(size) != 2 for size in sizes.values()) or (alpha is not None and alpha.size != 1):
            yield f"{place} {found}, expected matrices"
            continue
        (p, m), (q, n) = (_size(sizes, name) for name in WHOLES)
        inner = [sizes[f"{name}_a"][1] == sizes[f"{name}_b"][0] for name in WHOLES if name not in sizes]
        if (p * q, m * n) != shapes[place.module] or not all(inner):
            yield f"{place} {found}, expected a product {shapes[place.module]}"


def factors(adapters: Mapping[Place, Parts]) -> Factors:
    """Return float32 factors per linear: lokr_w1 whole, lokr_w2 as it is, alpha folded into w1.

    As all readers have it, alpha over the rank scales only where a factor is split; else it means nothing.
    """
    found: Factors = {}
    for place, held in adapters.items():
        parts = {name: part.astype(mx.float32) for name, part in held.items()}
        w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        split = next((parts[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)
        if "alpha" in parts and split is not None:
            w1 = w1 * (parts["alpha"].reshape(()) / split.shape[0])
        found[f"{place.module}.lokr_w1"] = w1
        for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b"):
            if name in parts:
                found[f"{place.module}.{name}"] = parts[name]
    return found


def _size(sizes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    if name in sizes:
        return sizes[name][0], sizes[name][1]
    return sizes[f"{name}_a"][0], sizes[f"{name}_b"][1]
