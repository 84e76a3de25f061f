"""Noise levels and whole sampling runs of diffusers' klein pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from tests.golden.recorders.transformer import CONFIG, HEIGHT, TEXT_LENGTH, WIDTH, tiny

TOKENS, STEPS = (1024, 4096, 4300, 4301), (1, 4, 28, 50)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler as FLUX.2's repositories configure it."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def sigmas(tokens: int, steps: int) -> np.ndarray:
    """Return what the pipeline's scheduler steps through."""
    levels = scheduler()
    levels.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    return levels.sigmas.numpy()


def autoencoder() -> AutoencoderKLFlux2:
    """Return one that only says how large latents are."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        norm_num_groups=1,
        latent_channels=CONFIG["in_channels"] // 4,
    )


def drawn(pipeline: DiffusionPipeline, noise: torch.Tensor, steps: int, **given: torch.Tensor) -> np.ndarray:
    """Return the latent [1, C, h, w] that a pipeline draws, before it is decoded."""
    pipeline.set_progress_bar_config(disable=True)
    last: dict[str, torch.Tensor] = {}

    def keep(_pipeline: object, _step: int, _timestep: object, tensors: dict) -> dict:
        last.update(tensors)
        return {}

    pipeline(
        height=2 * HEIGHT,
        width=2 * WIDTH,
        num_inference_steps=steps,
        guidance_scale=4.0,
        latents=noise,
        output_type="latent",
        callback_on_step_end=keep,
        **given,
    )
    return last["latents"].transpose(1, 2).reshape(noise.shape).numpy()


def sampled(
    noise: torch.Tensor, txt: torch.Tensor, empty: torch.Tensor, *, steps: int, distilled: bool
) -> np.ndarray:
    """Return the latent [1, C, h, w] that the klein pipeline draws."""
    model = tiny(guidance_embeds=False)
    pipeline = Flux2KleinPipeline(scheduler(), autoencoder(), None, None, model, is_distilled=distilled)
    return drawn(pipeline, noise, steps, prompt_embeds=txt, negative_prompt_embeds=empty)


def record(out: Path) -> None:
    """Write flow.npz."""
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(1, CONFIG["in_channels"], HEIGHT, WIDTH, generator=generator)
    txt, empty = torch.randn(2, 1, TEXT_LENGTH, CONFIG["joint_attention_dim"], generator=generator)
    np.savez_compressed(
        out / "flow.npz",
        noise=noise.numpy(),
        txt=txt.numpy(),
        empty=empty.numpy(),
        distilled=sampled(noise, txt, empty, steps=4, distilled=True),
        guided=sampled(noise, txt, empty, steps=6, distilled=False),
        **{f"sigmas_{tokens}_{steps}": sigmas(tokens, steps) for tokens in TOKENS for steps in STEPS},
    )
