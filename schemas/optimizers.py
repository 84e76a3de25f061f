"""`[train.optimizer]`: one struct per optimizer, tagged by `kind`; `default_rate` is its own learning rate.

`lora_plus_ratio` (LoRA+, Hayou et al. 2024) gives every B that many times the rate of A. Prodigy has no such field:
it finds one rate for everything.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from schemas.base import Strict

Beta = Annotated[float, Meta(ge=0.0, lt=1.0)]
Eps = Annotated[float, Meta(gt=0.0, le=1.0)]
Decay = Annotated[float, Meta(ge=0.0, le=1.0)]
Ratio = Annotated[float, Meta(ge=0.01, le=1000.0)]


class AdamW(Strict, frozen=True, tag_field="kind", tag="adamw"):
    """AdamW with decoupled weight decay; bias-corrected moments."""

    default_rate: ClassVar[float] = 1e-4

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Eps = 1e-8
    weight_decay: Decay = 1e-4
    lora_plus_ratio: Ratio = 1.0


class AdamW8bit(Strict, frozen=True, tag_field="kind", tag="adamw8bit"):
    """AdamW whose moments rest as 8-bit codes between steps: a quarter of the state, and a little noise."""

    default_rate: ClassVar[float] = 1e-4

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Eps = 1e-8
    weight_decay: Decay = 1e-4
    lora_plus_ratio: Ratio = 1.0


class Adafactor(Strict, frozen=True, tag_field="kind", tag="adafactor"):
    """Second moments as row and column means, updates clipped by their RMS; the learning rate always acts.

    `beta1` 0 keeps no first moment. `scale_parameter` multiplies the rate by a factor's RMS, at least 1e-3: B, zero
    at first, then starts a thousand times slower.
    """

    default_rate: ClassVar[float] = 1e-4

    beta1: Beta = 0.0
    decay_rate: Annotated[float, Meta(ge=-1.0, lt=0.0)] = -0.8
    clip_threshold: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    scale_parameter: bool = False
    weight_decay: Decay = 0.0
    lora_plus_ratio: Ratio = 1.0


class Lion(Strict, frozen=True, tag_field="kind", tag="lion"):
    """The sign of an interpolated momentum: every weight moves by the whole rate at every step.

    Its paper advises a rate 3 to 10 times below AdamW's and a decay as much above: here 0.3 and 3.
    """

    default_rate: ClassVar[float] = 3e-5

    beta1: Beta = 0.9
    beta2: Beta = 0.99
    weight_decay: Decay = 3e-4
    lora_plus_ratio: Ratio = 1.0


class Prodigy(Strict, frozen=True, tag_field="kind", tag="prodigy"):
    """Adam that estimates its step size; `train.learning_rate` multiplies the estimate and stays at 1.

    `beta3` absent is sqrt(beta2); `growth_rate` absent lets the estimate jump, 1.02 lets it grow by 2 % a step.
    """

    default_rate: ClassVar[float] = 1.0

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    beta3: Beta | None = None
    eps: Eps = 1e-8
    weight_decay: Decay = 0.0
    d0: Annotated[float, Meta(ge=1e-10, le=1.0)] = 1e-6
    d_coef: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    growth_rate: Annotated[float, Meta(gt=1.0, le=1e6)] | None = None
    use_bias_correction: bool = False
    safeguard_warmup: bool = False


class Muon(Strict, frozen=True, tag_field="kind", tag="muon"):
    """Momentum made orthogonal by Newton-Schulz steps; for matrices, which all factors are."""

    default_rate: ClassVar[float] = 1e-3

    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Meta(ge=1, le=20)] = 5
    weight_decay: Decay = 0.0
    lora_plus_ratio: Ratio = 1.0


class ScheduleFree(Strict, frozen=True, tag_field="kind", tag="schedule_free"):
    """Schedule-free AdamW (Defazio et al. 2024): a running average replaces the decay of the rate.

    Meant for the constant schedule with a warm-up. The average is what is saved and drawn; `r` and
    `weight_lr_power` say how much later and faster steps count in it.
    """

    default_rate: ClassVar[float] = 3e-4

    beta1: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.9
    beta2: Beta = 0.999
    eps: Eps = 1e-8
    weight_decay: Decay = 0.0
    r: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    weight_lr_power: Annotated[float, Meta(ge=0.0, le=10.0)] = 2.0
    lora_plus_ratio: Ratio = 1.0


Optimizer = AdamW | AdamW8bit | Adafactor | Lion | Prodigy | Muon | ScheduleFree
