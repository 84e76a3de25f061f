"""Mode-sampled timesteps and loss weights by diffusers' training utilities, Huber losses by torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

MODE_SCALES = (1.29, -0.7)
DELTAS = (0.1, 1.5)


def mode(scale: float) -> torch.Tensor:
    """Return diffusers' draws; there 0 is the noisy end, so t = 1 - draw for the same uniform numbers."""
    generator = torch.Generator().manual_seed(3)
    return 1 - compute_density_for_timestep_sampling("mode", 64, mode_scale=scale, generator=generator)


def record(out: Path) -> None:
    """Write objective.npz."""
    uniform = torch.rand(size=(64,), generator=torch.Generator().manual_seed(3))
    sigmas = torch.arange(1, 1001, dtype=torch.float32)[::37] / 1000
    errors = torch.randn(200, generator=torch.Generator().manual_seed(4)) * 2
    zero = torch.zeros_like(errors)
    arrays = {
        "uniform": uniform,
        **{f"mode_{scale}": mode(scale) for scale in MODE_SCALES},
        "sigmas": sigmas,
        "sigma_sqrt": compute_loss_weighting_for_sd3("sigma_sqrt", sigmas),
        "cosmap": compute_loss_weighting_for_sd3("cosmap", sigmas),
        "errors": errors,
        **{
            f"huber_{delta}": torch.nn.functional.huber_loss(errors, zero, reduction="none", delta=delta)
            for delta in DELTAS
        },
    }
    np.savez_compressed(out / "objective.npz", **{name: array.numpy() for name, array in arrays.items()})
