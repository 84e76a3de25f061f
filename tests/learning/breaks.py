"""Mistakes made on purpose, each in the one place where it could be made: `apply(patch)` puts one in.

`DRAWING` breaks what turns words into pictures, `TRAINING` what teaches a LoRA, `NUMERIC` what is only to be seen in
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from stages.flux2 import blocks, flow, positions, transformer
from stages.flux2.autoencoder import Whitening
from stages.flux2.blocks import Modulation, SwiGLU
from stages.flux2.text import tokenize
from stages.flux2.text.decoder import DecoderStack
from stages.flux2.text.prompts import PROMPT, QWEN3, Text
from stages.flux2.transformer import FinalLayer, SharedModulation, Transformer
from stages.lora.layer import Factors
from stages.training import objective, step
from stages.training.optimizers.choice import optimizer
from stages.training.optimizers.rule import UP_MATRIX, State

Break = Callable[[pytest.MonkeyPatch], None]


def final_scale_and_shift_swapped(patch: pytest.MonkeyPatch) -> None:
    def swapped(layer: FinalLayer, x: mx.array, vec: mx.array) -> mx.array:
        silu, lin = layer.adaLN_modulation
        scale, shift = mx.split(lin(silu(vec))[:, None], 2, axis=-1)
        return layer.linear(blocks.modulate(x, shift, scale, layer.eps))

    patch.setattr(FinalLayer, "__call__", swapped)


def times_scaled(patch: pytest.MonkeyPatch, factor: float) -> None:
    patch.setattr(transformer, "TIME_SCALE", factor * transformer.TIME_SCALE)


def times_reversed(patch: pytest.MonkeyPatch) -> None:
    call = Transformer.__call__

    def reversed_(model: Transformer, img: mx.array, txt: mx.array, timesteps: mx.array, *rest: Any) -> mx.array:
        return call(model, img, txt, 1 - timesteps, *rest)

    patch.setattr(Transformer, "__call__", reversed_)


def whitening_not_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Whitening, "whiten", lambda _, latents: latents)


def whitening_not_undone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Whitening, "color", lambda _, latents: latents)


def text_layers_reversed(patch: pytest.MonkeyPatch) -> None:
    states = DecoderStack.states

    def reversed_(stack: DecoderStack, *given: Any) -> mx.array:
        low, middle, high = mx.split(states(stack, *given), 3, axis=-1)
        return mx.concatenate([high, middle, low], axis=-1)

    patch.setattr(DecoderStack, "states", reversed_)


def no_template(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokenize, "template_of", lambda _: replace(QWEN3, pieces=(Text(PROMPT),)))


def target_sign_flipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objective, "velocity", lambda latents, noise: latents - noise)


def up_matrices_never_updated(patch: pytest.MonkeyPatch) -> None:
    def half(spec: Any) -> Any:
        rule = optimizer(spec)

        def update(gradients: Factors, factors: Factors, state: State, rate: mx.array) -> tuple[Factors, State]:
            found, state = rule.update(gradients, factors, state, rate)
            return {name: factors[name] if name.endswith(UP_MATRIX) else found[name] for name in found}, state

        return SimpleNamespace(initial=rule.initial, update=update, evaluated=rule.evaluated)

    patch.setattr(step, "optimizer", half)


def block_modulation_swapped(patch: pytest.MonkeyPatch) -> None:
    call = SharedModulation.__call__

    def swapped(layer: SharedModulation, vec: mx.array) -> list[Modulation]:
        return [Modulation(each.scale, each.shift, each.gate) for each in call(layer, vec)]

    patch.setattr(SharedModulation, "__call__", swapped)


def gate_halves_swapped(patch: pytest.MonkeyPatch) -> None:
    call = SwiGLU.__call__

    def swapped(layer: SwiGLU, x: mx.array) -> mx.array:
        gate, value = mx.split(x, 2, axis=-1)
        return call(layer, mx.concatenate([value, gate], axis=-1))

    patch.setattr(SwiGLU, "__call__", swapped)


def rope_base_of_others(patch: pytest.MonkeyPatch) -> None:
    tables = positions._tables
    patch.setattr(positions, "_tables", lambda axes, _theta, *sizes: tables(axes, 10_000.0, *sizes))


def padding_side_swapped(patch: pytest.MonkeyPatch) -> None:
    template_of = tokenize.template_of

    def turned(kind: Any) -> Any:
        template = template_of(kind)
        return replace(template, pads_left=not template.pads_left)

    patch.setattr(tokenize, "template_of", turned)


def schedule_shifted_as_in_training(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flow, "inference_mu", lambda tokens, _steps: flow.training_mu(tokens))


def schedule_not_shifted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flow, "inference_mu", lambda _tokens, _steps: 0.0)


def schedule_without_its_jump(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flow, "JUMP_TOKENS", 1 << 30)


DRAWING: dict[str, Break] = {
    "final scale and shift swapped": final_scale_and_shift_swapped,
    "times a thousand times too small": partial(times_scaled, factor=1e-3),
    "times a thousand times too large": partial(times_scaled, factor=1e3),
    "times reversed": times_reversed,
    "whitening not undone": whitening_not_undone,
    "no template": no_template,
}
TRAINING: dict[str, Break] = {
    "target's sign flipped": target_sign_flipped,
    "times a thousand times too small": partial(times_scaled, factor=1e-3),
    "times reversed": times_reversed,
    "latents not whitened": whitening_not_done,
    "B never updated": up_matrices_never_updated,
}
ENCODING = ("latents not whitened",)  # of these, what breaks before training
NUMERIC: dict[str, Break] = {
    # Its text encoder is random, so neighbouring layers are alike: 16 of 16 prompts were still followed.
    "text layers reversed": text_layers_reversed,
    "block modulation swapped": block_modulation_swapped,
    "gate halves swapped": gate_halves_swapped,
    "rope base 10000": rope_base_of_others,
    "padding on the other side": padding_side_swapped,
    "schedule shifted as in training": schedule_shifted_as_in_training,
    "schedule not shifted": schedule_not_shifted,
    "schedule without its jump": schedule_without_its_jump,
}
