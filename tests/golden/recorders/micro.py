"""The built-in model through diffusers and transformers: it loads with no key missing or left over."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3ForCausalLM

from stages.flux2.micro import make_micro
from stages.flux2.variants import MICRO
from tests.golden.recorded_prompts import MICRO_GRID, MICRO_PROMPT


def load(kind: type, folder: Path) -> torch.nn.Module:
    """Return one part; every tensor of the file is used and every parameter is in the file."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    if any(info.values()):
        raise ValueError(f"{folder.name}: {info}")
    return model.eval()


def positions(time: int, rows: int, columns: int, text: int) -> torch.Tensor:
    """Return ids [1, tokens, 4]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in (time, rows, columns, text)))[None]


@torch.no_grad()
def record(out: Path) -> None:
    """Write micro.npz."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_micro(folder)
        pipeline = Flux2KleinPipeline.from_pretrained(folder)
        transformer = load(Flux2Transformer2DModel, folder / "transformer")
        autoencoder = load(AutoencoderKLFlux2, folder / "vae")
        text_encoder = load(Qwen3ForCausalLM, folder / "text_encoder")
    length = MICRO.text_encoder.length
    text = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        text_encoder, pipeline.tokenizer, MICRO_PROMPT, max_sequence_length=length
    )
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randn(1, MICRO_GRID[0] * MICRO_GRID[1], MICRO.transformer.in_channels, generator=generator)
    velocity = transformer(
        hidden_states=tokens,
        encoder_hidden_states=text,
        timestep=torch.tensor([0.6]),
        img_ids=positions(1, *MICRO_GRID, 1),
        txt_ids=positions(1, 1, 1, length),
        return_dict=False,
    )[0]
    latents = torch.randn(1, MICRO.autoencoder.latent_channels, 4, 6, generator=generator)
    arrays = {
        "text": text,
        "tokens": tokens,
        "velocity": velocity,
        "raw_latents": latents,
        "picture": autoencoder.decode(latents, return_dict=False)[0],
    }
    np.savez_compressed(out / "micro.npz", **{key: array.numpy() for key, array in arrays.items()})
