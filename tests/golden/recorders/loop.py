"""Twenty AdamW steps of a LoRA as a torch, diffusers and peft loop takes them, in diffusers' own manner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig

from stages.flux2.names import diffusers_modules
from tests.golden.recorders.training import ALPHA, LINEARS, RANK, random_factors
from tests.golden.recorders.transformer import CONFIG, TEXT_LENGTH, tiny

STEPS, BATCH, WARMUP = 20, 2, 3
PEAK_RATE, CLIP_NORM, WEIGHT_DECAY = 1e-3, 0.2, 1e-2
SHAPES = ((3, 5), (5, 3))  # micro-batches take turns
ACCUMULATIONS = (1, 2)


def adapted() -> Flux2Transformer2DModel:
    """Return the tiny model with fresh peft adapters: q, k and v share one A, whose gradients then add up."""
    model = tiny(guidance_embeds=False)
    targets = [source for name in LINEARS for source in diffusers_modules(name)]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    factors = random_factors()
    for name in LINEARS:
        shared = torch.nn.Parameter(factors[f"{name}.lora_A"].clone())
        for source in diffusers_modules(name):
            model.get_submodule(source).lora_A["default"].weight = shared
    return model


def factors_of(model: Flux2Transformer2DModel) -> dict[str, np.ndarray]:
    """Return A and B of every fused linear; q, k and v are thirds of B."""
    found = {}
    for name in LINEARS:
        layers = [model.get_submodule(source) for source in diffusers_modules(name)]
        found[f"{name}.lora_A"] = layers[0].lora_A["default"].weight
        found[f"{name}.lora_B"] = torch.cat([layer.lora_B["default"].weight for layer in layers])
    return {name: factor.detach().numpy().copy() for name, factor in found.items()}


def draws() -> dict[str, torch.Tensor]:
    """Return the latents and text of a batch per shape, and noise and timesteps of every micro-batch."""
    generator = torch.Generator().manual_seed(31)
    channels, features, count = CONFIG["in_channels"], CONFIG["joint_attention_dim"], STEPS * max(ACCUMULATIONS)
    found = {
        "text": torch.randn(len(SHAPES), BATCH, TEXT_LENGTH, features, generator=generator),
        "noise": torch.randn(count, BATCH, channels * SHAPES[0][0] * SHAPES[0][1], generator=generator),
        "timesteps": compute_density_for_timestep_sampling(
            "logit_normal", count * BATCH, logit_mean=0.0, logit_std=1.0, generator=generator
        ).reshape(count, BATCH),
    }
    for index, (height, width) in enumerate(SHAPES):
        found[f"latents_{index}"] = torch.randn(BATCH, channels, height, width, generator=generator)
    return found


def micro_batches(given: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield every micro-batch."""
    for index, (noise, timesteps) in enumerate(zip(given["noise"], given["timesteps"], strict=True)):
        latents = given[f"latents_{index % len(SHAPES)}"]
        text = given["text"][index % len(SHAPES)]
        yield {"latents": latents, "noise": noise.reshape(latents.shape), "text": text, "timesteps": timesteps}


def loss(model: Flux2Transformer2DModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the flow-matching loss."""
    latents, noise = batch["latents"], batch["noise"]
    sigmas = batch["timesteps"].reshape(-1, 1, 1, 1)
    predicted = model(
        hidden_states=Flux2KleinPipeline._pack_latents((1.0 - sigmas) * latents + sigmas * noise),
        encoder_hidden_states=batch["text"],
        timestep=batch["timesteps"],
        txt_ids=Flux2KleinPipeline._prepare_text_ids(batch["text"]),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(latents),
        return_dict=False,
    )[0]
    target = Flux2KleinPipeline._pack_latents(noise - latents)
    return torch.mean((predicted - target).square().reshape(len(target), -1), 1).mean()


def train(given: dict[str, torch.Tensor], accumulation: int) -> dict[str, np.ndarray]:
    """Return losses and gradient norms [20] of a training, and the factors after it."""
    model = adapted()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    batches = micro_batches(given)
    losses, norms = [], []
    for _ in range(STEPS):
        values = []
        for _ in range(accumulation):
            value = loss(model, next(batches)) / accumulation
            value.backward()
            values.append(value.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(sum(values))
    trained = {f"trained_{accumulation}.{name}": factor for name, factor in factors_of(model).items()}
    return {f"losses_{accumulation}": np.array(losses), f"norms_{accumulation}": np.array(norms), **trained}


def record(out: Path) -> None:
    """Write loop.npz."""
    given = draws()
    arrays = {name: array.numpy() for name, array in given.items()}
    arrays |= {f"start.{name}": factor for name, factor in factors_of(adapted()).items() if name.endswith("lora_A")}
    for accumulation in ACCUMULATIONS:
        arrays |= train(given, accumulation)
    np.savez_compressed(out / "loop.npz", **arrays)
