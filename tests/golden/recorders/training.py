"""Loss and adapter gradients by peft, and velocities of LoRA files as diffusers loads and saves them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from stages.flux2.names import diffusers_modules
from stages.flux2.variants import TransformerConfig
from stages.lora.formats import bfl
from stages.lora.targets import linear_shapes, resolve
from tests.golden.recorders.transformer import CONFIG, HEIGHT, WIDTH, ids, inputs, tiny

RANK, ALPHA = 4, 2.0
MODEL = TransformerConfig(**CONFIG)
LINEARS = {name: linear_shapes(MODEL)[name] for name in resolve(MODEL, "blocks")}


def random_factors() -> dict[str, torch.Tensor]:
    """Return factors of every linear of the blocks by their names in this project, B not zero."""
    generator = torch.Generator().manual_seed(13)
    factors = {}
    for name, (rows, columns) in LINEARS.items():
        factors[f"{name}.lora_A"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        factors[f"{name}.lora_B"] = torch.randn(rows, RANK, generator=generator) * 0.3
    return factors


def adapted(factors: dict[str, torch.Tensor], *, guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    """Return the tiny model with peft adapters; q, k and v hold the same A, and thirds of B."""
    model = tiny(guidance_embeds=guidance_embeds)
    targets = [source for name in LINEARS for source in diffusers_modules(name)]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    with torch.no_grad():
        for name in LINEARS:
            sources = diffusers_modules(name)
            for source, rows in zip(sources, factors[f"{name}.lora_B"].chunk(len(sources)), strict=True):
                layer = model.get_submodule(source)
                layer.lora_A["default"].weight.copy_(factors[f"{name}.lora_A"])
                layer.lora_B["default"].weight.copy_(rows)
    return model


def gradients(model: Flux2Transformer2DModel) -> dict[str, torch.Tensor]:
    """Return gradients of one A per fused linear (the sum over its copies) and of B (thirds below each other)."""
    found = {}
    for name in LINEARS:
        layers = [model.get_submodule(source) for source in diffusers_modules(name)]
        found[f"{name}.lora_A"] = sum(layer.lora_A["default"].weight.grad for layer in layers)
        found[f"{name}.lora_B"] = torch.cat([layer.lora_B["default"].weight.grad for layer in layers])
    return found


def batch() -> dict[str, torch.Tensor]:
    """Return latents, noise, text, timesteps and weights as the project's objective takes them."""
    generator = torch.Generator().manual_seed(17)
    latents, noise = torch.randn(2, 2, CONFIG["in_channels"], HEIGHT, WIDTH, generator=generator)
    given = inputs(2)
    return {
        "latents": latents,
        "noise": noise,
        "text": given["encoder_hidden_states"],
        "timesteps": torch.tensor([0.2, 0.9]),
        "weights": torch.tensor([0.5, 1.5]),
    }


def loss(
    model: Flux2Transformer2DModel, given: dict[str, torch.Tensor], guidance: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted flow-matching loss, tokens packed row by row."""
    t = given["timesteps"].reshape(-1, 1, 1, 1)
    noisy = (1 - t) * given["latents"] + t * given["noise"]
    predicted = model(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=given["text"],
        timestep=given["timesteps"],
        guidance=guidance,
        **ids(),
        return_dict=False,
    )[0]
    target = (given["noise"] - given["latents"]).flatten(2).transpose(1, 2)
    return (given["weights"] * (predicted - target).square().mean(dim=(1, 2))).mean()


def loaded_velocity(path: Path) -> torch.Tensor:
    """Return the velocity of the tiny model with a LoRA file that diffusers loads."""
    pipeline = Flux2KleinPipeline(None, None, None, None, tiny(guidance_embeds=False))
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    with torch.no_grad():
        return pipeline.transformer(**inputs(2), **ids(), return_dict=False)[0]


def record(out: Path) -> None:
    """Write training.npz, lora-bfl.safetensors (written here, read there) and lora-diffusers.safetensors (theirs)."""
    factors, given = random_factors(), batch()
    model = adapted(factors)
    value = loss(model, given)
    value.backward()
    ours = {name: mx.array(factor.numpy()) for name, factor in factors.items()}
    scaled = {name: factor * (ALPHA / RANK if name.endswith("lora_B") else 1) for name, factor in ours.items()}
    tensors = bfl.to_tensors(scaled, dtype=mx.float32)
    mx.save_safetensors(str(out / "lora-bfl.safetensors"), tensors, bfl.metadata(RANK, {}))
    adapter = model.peft_config["default"].to_dict()
    adapter["target_modules"] = sorted(adapter["target_modules"])  # a set there: another order in every process
    with tempfile.TemporaryDirectory() as folder:
        Flux2KleinPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=adapter,
        )
        data = (Path(folder) / "pytorch_lora_weights.safetensors").read_bytes()
        (out / "lora-diffusers.safetensors").write_bytes(data)
    arrays = {
        **given,
        "loss": value.detach(),
        **{f"factor.{name}": factor for name, factor in factors.items()},
        **{f"gradient.{name}": gradient for name, gradient in gradients(model).items()},
        "velocity_bfl": loaded_velocity(out / "lora-bfl.safetensors"),
        "velocity_diffusers": loaded_velocity(out / "lora-diffusers.safetensors"),
    }
    np.savez_compressed(out / "training.npz", **{name: array.numpy() for name, array in arrays.items()})
