"""Optimizers by torch, transformers and their authors' packages, on recorded gradients; schedules by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch.optim import Optimizer
from transformers.optimization import Adafactor

STEPS = 20
# Odd sizes; wide and tall as A and B are, and B starts at zero.
SHAPES = {"one.lora_A": (3, 17), "one.lora_B": (13, 3), "two.lora_A": (5, 7), "two.lora_B": (7, 5)}
WARMUP, TOTAL = 4, 23

CASES: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "adamw": lambda factors: torch.optim.AdamW(factors, lr=0.02, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1),
    "adafactor": lambda factors: Adafactor(
        factors,
        lr=0.02,
        clip_threshold=0.7,
        decay_rate=-0.6,
        beta1=0.8,
        weight_decay=0.1,
        scale_parameter=True,
        relative_step=False,
    ),
    "lion": lambda factors: Lion(factors, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1),
    "muon": lambda factors: torch.optim.Muon(factors, lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4),
    "muon_plain": lambda factors: torch.optim.Muon(factors, lr=0.02, weight_decay=0.0, nesterov=False),
    "prodigy": lambda factors: Prodigy(factors, d0=1e-3),
    "prodigy_all": lambda factors: Prodigy(
        factors,
        lr=0.5,
        betas=(0.8, 0.99),
        beta3=0.9,
        eps=1e-6,
        weight_decay=0.1,
        d0=1e-3,
        d_coef=2.0,
        growth_rate=1.2,
        use_bias_correction=True,
        safeguard_warmup=True,
    ),
    "schedule_free": lambda factors: AdamWScheduleFree(factors, lr=0.02, warmup_steps=5, foreach=False),
    "schedule_free_all": lambda factors: AdamWScheduleFree(
        factors,
        lr=0.02,
        betas=(0.8, 0.99),
        eps=1e-6,
        weight_decay=0.1,
        warmup_steps=5,
        r=1.5,
        weight_lr_power=1.0,
        foreach=False,
    ),
}


def start(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the factors that every optimizer starts from."""
    return {
        name: torch.zeros(shape) if name.endswith("lora_B") else torch.randn(shape, generator=generator) * 0.3
        for name, shape in SHAPES.items()
    }


def random_gradients(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return gradients [STEPS, ...] with a direction, noise and rows decades apart; A's first is zero, as B is."""
    found = {}
    for name, shape in SHAPES.items():
        rows = torch.logspace(-3, 0, shape[0]).reshape(-1, 1)
        drift = torch.randn(shape, generator=generator)
        found[name] = rows * (drift + torch.randn((STEPS, *shape), generator=generator))
        if name.endswith("lora_A"):
            found[name][0] = 0
    return found


def trained(
    make: Callable[[list[torch.nn.Parameter]], Optimizer],
    factors: dict[str, torch.Tensor],
    gradients: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the factors after each step, [STEPS, ...], those of evaluation too, and Prodigy's estimates."""
    parameters = {name: torch.nn.Parameter(factor.clone()) for name, factor in factors.items()}
    optimizer = make(list(parameters.values()))
    history: dict[str, list[torch.Tensor]] = {}
    for step in range(STEPS):
        if isinstance(optimizer, AdamWScheduleFree):
            optimizer.train()
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            history.setdefault(name, []).append(parameter.detach().clone())
        if isinstance(optimizer, AdamWScheduleFree):
            optimizer.eval()
            for name, parameter in parameters.items():
                history.setdefault(f"{name}.evaluated", []).append(parameter.detach().clone())
        if isinstance(optimizer, Prodigy):
            history.setdefault("d", []).append(torch.tensor(optimizer.param_groups[0]["d"]))
    return {name: torch.stack(values) for name, values in history.items()}


def schedules() -> dict[str, list[float]]:
    """Return the shares of the peak at steps 0 to TOTAL, with and without a least share."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = {
        "linear": transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, TOTAL),
        "cosine": transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, TOTAL),
        "cosine_min": transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, WARMUP, TOTAL, min_lr_rate=0.1
        ),
        "cosine_restarts": transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, WARMUP, TOTAL, num_cycles=3
        ),
        "polynomial_min": transformers.get_polynomial_decay_schedule_with_warmup(
            optimizer, WARMUP, TOTAL, lr_end=0.1, power=1.7
        ),
    }
    return {name: [schedule.lr_lambdas[0](step) for step in range(TOTAL + 1)] for name, schedule in made.items()}


def record(out: Path) -> None:
    """Write optimizers.npz."""
    generator = torch.Generator().manual_seed(19)
    factors, gradients = start(generator), random_gradients(generator)
    arrays = {
        **{f"start.{name}": factor for name, factor in factors.items()},
        **{f"gradient.{name}": gradient for name, gradient in gradients.items()},
    }
    # Muon's iteration is in bfloat16 there; in float32 its values can be held against another float32 one. A copy,
    # as it divides in place.
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        for case, make in CASES.items():
            arrays |= {f"{case}.{name}": values for name, values in trained(make, factors, gradients).items()}
    values = {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
    values |= {f"schedule.{name}": np.array(shares) for name, shares in schedules().items()}
    np.savez_compressed(out / "optimizers.npz", **values)
