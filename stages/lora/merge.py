"""Putting adapters onto a transformer and taking them off again; base weights are never written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from schemas.adapter import Adapter as Spec
from schemas.adapter import LoKr
from schemas.train import Train
from stages.flux2.transformer import Transformer
from stages.lora.continuing import require_match
from stages.lora.dropout import KEEP_ALL, Draw, Rates, draw_key
from stages.lora.layer import Adapter, Factors, by_module, limited
from stages.lora.start import fresh, loaded, require_rank, scale_of
from stages.lora.targets import linear_shapes, sizes


def attach(transformer: Transformer, settings: Train, *, seed: int, start: Factors | None = None) -> None:
    """Freeze the transformer and put a trainable adapter beside each target of the settings.

    `start` are the factors of a file to train on from, as `formats.read` returns them. Raises `BadConfig` for
    patterns that match nothing and a start that is not what the settings train.
    """
    transformer.freeze()
    spec, shapes = settings.adapter, linear_shapes(transformer.config)
    targets = sizes(transformer.config, settings)
    require_rank(spec, transformer.config, targets)
    if start is not None:
        require_match(spec, transformer.config, targets, start)
    parts = by_module(start or {})
    for name, size in targets.items():
        base = _get(transformer, name)
        if start is None:
            layer = fresh(spec, base, shapes[name], module=name, size=size, seed=seed)
        else:
            layer = loaded(base, parts[name], scale_of(spec, size))
        _set(transformer, name, layer)


def trainable(transformer: Transformer) -> Factors:
    """Return the factors of all adapters on the transformer."""
    return _joined({name: layer.parts for name, layer in adapters(transformer).items()})


def assign(transformer: Transformer, factors: Factors) -> None:
    """Set the factors of adapters that are already on the transformer."""
    for name, layer in adapters(transformer).items():
        for part in layer.parts:
            layer[part] = factors[f"{name}.{part}"]


def portable(transformer: Transformer, factors: Factors) -> Factors:
    """Return factors of the adapters on the transformer as a file holds them: no scale, relative to its weights."""
    layers, parts = adapters(transformer), by_module(factors)
    return _joined({name: layer.portable(parts[name]) for name, layer in layers.items()})


def limiter(transformer: Transformer, most: float | None) -> Callable[[Factors], Factors]:
    """Return limit(factors) -> factors with the norm of each adapter's change at most `most`; None bounds nothing."""
    layers = adapters(transformer)

    def limit(factors: Factors) -> Factors:
        if most is None:
            return factors
        parts = by_module(factors)
        return _joined({name: limited(layer, parts[name], most) for name, layer in layers.items()})

    return limit


def draw_keys(transformer: Transformer, spec: Spec, *, seed: int, step: int, micro_batch: int) -> dict[str, mx.array]:
    """Return the key of every adapter's dropout in a micro-batch of a step; none when the settings drop nothing."""
    if not rates(spec).any:
        return {}
    return {name: draw_key(seed, step, micro_batch, name) for name in adapters(transformer)}


@contextlib.contextmanager
def dropping(transformer: Transformer, spec: Spec, keys: Mapping[str, mx.array]) -> Iterator[None]:
    """Let the adapters drop by `keys` of `draw_keys`; it must last until the backward pass is built too."""
    layers = adapters(transformer)
    for name, key in keys.items():
        layers[name].draw = Draw(rates(spec), key)
    try:
        yield
    finally:
        for name in keys:
            layers[name].draw = KEEP_ALL


def rates(spec: Spec) -> Rates:
    """Return the settings' rates of dropping."""
    ranks = 0.0 if isinstance(spec, LoKr) else spec.rank_dropout
    return Rates(spec.dropout, ranks, spec.module_dropout)


def adapters(transformer: Transformer) -> dict[str, Adapter]:
    """Return the adapters on the transformer by module name, in the order of the forward pass."""
    found = {name: _get(transformer, name) for name in linear_shapes(transformer.config)}
    return {name: layer for name, layer in found.items() if isinstance(layer, Adapter)}


@contextlib.contextmanager
def applied(transformer: Transformer, factors: Factors) -> Iterator[None]:
    """Let the transformer compute with exactly `factors` (none if empty), and afterwards as before.

    What was there, training adapters too, is put back as the very same objects. `factors` are those of a file, as
    `formats.read` returns them.
    """
    parts = by_module(factors)
    before = {name: _get(transformer, name) for name in linear_shapes(transformer.config)}
    try:
        for name, layer in before.items():
            bare = layer.base if isinstance(layer, Adapter) else layer
            _set(transformer, name, loaded(bare, parts[name]) if name in parts else bare)
        yield
    finally:
        for name, layer in before.items():
            _set(transformer, name, layer)


def _joined(modules: Mapping[str, Factors]) -> Factors:
    return {f"{name}.{part}": factor for name, parts in modules.items() for part, factor in parts.items()}


def _get(transformer: Transformer, name: str) -> nn.Module:
    parent, leaf = _parent(transformer, name)
    return parent[int(leaf)] if isinstance(parent, list) else getattr(parent, leaf)


def _set(transformer: Transformer, name: str, layer: nn.Module) -> None:
    parent, leaf = _parent(transformer, name)
    if isinstance(parent, list):
        parent[int(leaf)] = layer
    else:
        setattr(parent, leaf, layer)


def _parent(transformer: Transformer, name: str) -> tuple[nn.Module | list, str]:
    """Walk to what holds the module `name`: a module (which is a dict) or a plain list."""
    *path, leaf = name.split(".")
    parent: nn.Module | list = transformer
    for part in path:
        parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
    return parent, leaf
