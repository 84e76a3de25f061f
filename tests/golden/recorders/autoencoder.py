"""Tiny random autoencoders as diffusers saves them, and what they make of a picture and of latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

CONFIG = {
    "block_out_channels": (8, 8, 12, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 2,
}
# A published decoder is narrower than its encoder.
SMALL_DECODER = {**CONFIG, "decoder_block_out_channels": (4, 8, 8, 12), "layers_per_block": 2}


def tiny(config: dict, seed: int) -> AutoencoderKLFlux2:
    """Return a random model in which no tensor is trivial: norms are not one, statistics not zero and one."""
    model = AutoencoderKLFlux2(**config).eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel()
        parameter.copy_(noise * fan_in**-0.5 if parameter.ndim > 1 else 0.5 + 0.2 * noise)
    model.bn.running_mean.copy_(torch.randn(model.bn.running_mean.shape, generator=generator))
    model.bn.running_var.copy_(0.2 + torch.rand(model.bn.running_var.shape, generator=generator))
    return model


def encoded(model: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """Return the whitened, patchified mean as the klein pipeline computes it for a reference picture."""
    mean = Flux2KleinPipeline._patchify_latents(model.encode(pictures).latent_dist.mode())
    statistics = (1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(statistics) + model.config.batch_norm_eps)
    return (mean - model.bn.running_mean.view(statistics)) / deviation


def decoded(model: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Return the picture as the klein pipeline decodes whitened latents, before it is clamped."""
    statistics = (1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(statistics) + model.config.batch_norm_eps)
    return model.decode(
        Flux2KleinPipeline._unpatchify_latents(latents * deviation + model.bn.running_mean.view(statistics)),
        return_dict=False,
    )[0]


def record(out: Path) -> None:
    """Write tiny-klein/vae, tiny-dev/vae (folders of diffusers) and autoencoder.npz."""
    generator = torch.Generator().manual_seed(11)
    pictures = torch.rand(2, 3, 48, 32, generator=generator) * 2 - 1
    latents = torch.randn(2, 8, 3, 2, generator=generator)
    arrays = {"pictures": pictures, "latents": latents}
    for name, config, seed in (("klein", CONFIG, 3), ("dev", SMALL_DECODER, 4)):
        model = tiny(config, seed)
        model.save_pretrained(out / f"tiny-{name}" / "vae")
        arrays[f"{name}_encoded"] = encoded(model, pictures)
        arrays[f"{name}_decoded"] = decoded(model, latents)
    np.savez(out / "autoencoder.npz", **{name: value.numpy() for name, value in arrays.items()})
