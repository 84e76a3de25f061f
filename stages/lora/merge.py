"""Putting adapters onto a transformer and taking them off again; base weights are never written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.nn as nn

from stages.flux2.transformer import Transformer
from stages.lora.layer import Factors, LoRALinear, initial_factors
from stages.lora.targets import linear_shapes


def attach(transformer: Transformer, names: list[str], *, rank: int, alpha: float, seed: int) -> None:
    """Freeze the transformer and put a fresh trainable adapter beside each linear in `names`."""
    transformer.freeze()
    shapes = linear_shapes(transformer.config)
    _place(transformer, initial_factors({name: shapes[name] for name in names}, rank, seed), scale=alpha / rank)


def trainable(transformer: Transformer) -> Factors:
    """Return the factors of all adapters on the transformer."""
    factors: Factors = {}
    for name, layer in adapters(transformer).items():
        factors[f"{name}.lora_A"] = layer.lora_A
        factors[f"{name}.lora_B"] = layer.lora_B
    return factors


def assign(transformer: Transformer, factors: Factors) -> None:
    """Set the factors of adapters that are already on the transformer."""
    for name, layer in adapters(transformer).items():
        layer.lora_A = factors[f"{name}.lora_A"]
        layer.lora_B = factors[f"{name}.lora_B"]


def adapters(transformer: Transformer) -> dict[str, LoRALinear]:
    """Return the adapters on the transformer by module name, in the order of the forward pass."""
    found = {name: _get(transformer, name) for name in linear_shapes(transformer.config)}
    return {name: layer for name, layer in found.items() if isinstance(layer, LoRALinear)}


@contextlib.contextmanager
def applied(transformer: Transformer, factors: Factors) -> Iterator[None]:
    """Let the transformer compute with exactly `factors` (none if empty), and afterwards as before.

    What was there, training adapters too, is put back as the very same objects. `factors` carry their scale in B,
    as `formats.read` returns them.
    """
    shapes = linear_shapes(transformer.config)
    before = {name: _get(transformer, name) for name in shapes}
    try:
        for name, layer in before.items():
            if isinstance(layer, LoRALinear):
                _set(transformer, name, layer.base)
        _place(transformer, factors, scale=1.0)
        yield
    finally:
        for name, layer in before.items():
            _set(transformer, name, layer)


def _place(transformer: Transformer, factors: Factors, *, scale: float) -> None:
    for name in linear_shapes(transformer.config):
        if f"{name}.lora_A" in factors:
            a, b = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
            _set(transformer, name, LoRALinear(_get(transformer, name), a, b, scale))


def _get(transformer: Transformer, name: str) -> nn.Module:
    parent, leaf = _parent(transformer, name)
    return parent[int(leaf)] if isinstance(parent, list) else parent[leaf]


def _set(transformer: Transformer, name: str, layer: nn.Module) -> None:
    parent, leaf = _parent(transformer, name)
    if isinstance(parent, list):
        parent[int(leaf)] = layer
    else:
        parent[leaf] = layer


def _parent(transformer: Transformer, name: str) -> tuple[nn.Module | list, str]:
    """Walk to what holds the module `name`: a module (which is a dict) or a plain list."""
    *path, leaf = name.split(".")
    parent: nn.Module | list = transformer
    for part in path:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    return parent, leaf
