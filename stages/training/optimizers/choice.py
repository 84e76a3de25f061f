"""From `[train.optimizer]` to the optimizer."""

from __future__ import annotations

from typing import assert_never

import schemas.optimizers as schema
from stages.training.optimizers import mlx_rules
from stages.training.optimizers.eight_bit import EightBit
from stages.training.optimizers.prodigy import Prodigy
from stages.training.optimizers.rule import Optimizer, PerFactor
from stages.training.optimizers.schedule_free import ScheduleFree


def optimizer(spec: schema.Optimizer) -> Optimizer:
    """Return the optimizer that the settings ask for."""
    match spec:
        case schema.AdamW():
            return PerFactor(mlx_rules.adamw(spec), spec.lora_plus_ratio)
        case schema.AdamW8bit():
            return PerFactor(EightBit(mlx_rules.adamw(spec)), spec.lora_plus_ratio)
        case schema.Adafactor():
            return PerFactor(mlx_rules.adafactor(spec), spec.lora_plus_ratio)
        case schema.Lion():
            return PerFactor(mlx_rules.lion(spec), spec.lora_plus_ratio)
        case schema.Muon():
            return PerFactor(mlx_rules.muon(spec), spec.lora_plus_ratio)
        case schema.Prodigy():
            return Prodigy(spec)
        case schema.ScheduleFree():
            return ScheduleFree(spec)
        case _:
            assert_never(spec)
