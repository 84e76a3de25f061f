"""Tiny random transformers as diffusers saves them, and their velocities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel

TEXT_LENGTH, HEIGHT, WIDTH = 7, 3, 5
CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4, 4),
}


def tiny(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """Return a random model in which no tensor is trivial: norms are not one, modulations not zero."""
    model = (
        Flux2Transformer2DModel(**CONFIG, guidance_embeds=guidance_embeds).eval().requires_grad_(requires_grad=False)
    )
    generator = torch.Generator().manual_seed(1 + guidance_embeds)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise * parameter.shape[1] ** -0.5)
    return model


def ids() -> dict[str, torch.Tensor]:
    """Return the positions (time, row, column, text) of text and image tokens."""
    text, image = torch.zeros(TEXT_LENGTH, 4), torch.zeros(HEIGHT * WIDTH, 4)
    text[:, 3] = torch.arange(TEXT_LENGTH)
    image[:, 1] = torch.arange(HEIGHT).repeat_interleave(WIDTH)
    image[:, 2] = torch.arange(WIDTH).repeat(HEIGHT)
    return {"txt_ids": text, "img_ids": image}


def inputs(batch: int) -> dict[str, torch.Tensor]:
    """Return image tokens, text and timesteps of a batch."""
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(batch, HEIGHT * WIDTH, CONFIG["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, CONFIG["joint_attention_dim"], generator=generator),
        "timestep": torch.linspace(0.3, 0.85, batch),
    }


def record(out: Path) -> None:
    """Write tiny-klein/, tiny-dev/ (folders of diffusers) and transformer.npz."""
    given, guidance = inputs(2), torch.tensor([1.0, 4.0])
    arrays = {**given, "guidance": guidance}
    for name, embeds in (("klein", False), ("dev", True)):
        model = tiny(guidance_embeds=embeds)
        model.save_pretrained(out / f"tiny-{name}" / "transformer")
        with torch.no_grad():
            arrays[name] = model(**given, **ids(), guidance=guidance, return_dict=False)[0]
    np.savez_compressed(out / "transformer.npz", **{name: array.numpy() for name, array in arrays.items()})
