"""DoRA, LoKr and PiSSA as peft computes them, and a DoRA file as diffusers saves it."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from peft.utils import get_peft_model_state_dict

from schemas.adapter import LoKr
from stages.flux2.names import diffusers_modules
from stages.lora import lokr
from stages.lora.formats import bfl
from tests.golden.recorders.training import ALPHA, LINEARS, RANK, batch, loss, random_factors
from tests.golden.recorders.transformer import ids, inputs, tiny

FACTOR = 4  # of LoKr: with rank 4 some of w2 are split and some whole
SIZES = (1, 7, 12, 32, 96, 127, 128, 3072, 9216, 27648)
FACTORS = (-1, 1, 4, 7, 16, 1000)
FUSED = {"img_attn.qkv": "attn.to_qkv", "txt_attn.qkv": "attn.to_added_qkv"}


def dora_model(factors: dict[str, torch.Tensor]) -> Flux2Transformer2DModel:
    """Return the tiny model with peft's DoRA; magnitudes are 0.8 to 1.2 times what they start as."""
    model = tiny(guidance_embeds=False)
    targets = [source for name in LINEARS for source in diffusers_modules(name)]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=True))
    generator = torch.Generator().manual_seed(19)
    with torch.no_grad():
        for name in LINEARS:
            sources = diffusers_modules(name)
            for source, rows in zip(sources, factors[f"{name}.lora_B"].chunk(len(sources)), strict=True):
                layer = model.get_submodule(source)
                layer.lora_A["default"].weight.copy_(factors[f"{name}.lora_A"])
                layer.lora_B["default"].weight.copy_(rows)
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude *= 0.8 + 0.4 * torch.rand(magnitude.shape, generator=generator)
    return model


def magnitudes(model: Flux2Transformer2DModel, *, gradient: bool) -> dict[str, torch.Tensor]:
    """Return the magnitudes of fused linears, or their gradients: those of q, k and v one after the other."""
    found = {}
    for name in LINEARS:
        layers = [model.get_submodule(source).lora_magnitude_vector["default"] for source in diffusers_modules(name)]
        parts = [layer.weight.grad if gradient else layer.weight.detach().clone() for layer in layers]
        found[f"{name}.lora_magnitude_vector"] = torch.cat(parts)
    return found


def dora(out: Path) -> dict[str, torch.Tensor]:
    """Return magnitudes, loss, gradients and velocity; write lora-dora.safetensors as diffusers saves it."""
    model = dora_model(random_factors())
    value = loss(model, batch())
    value.backward()
    found = {f"dora.{name}": array for name, array in magnitudes(model, gradient=False).items()}
    found |= {f"dora_gradient.{name}": array for name, array in magnitudes(model, gradient=True).items()}
    for name in LINEARS:
        layers = [model.get_submodule(source) for source in diffusers_modules(name)]
        found[f"dora_gradient.{name}.lora_A"] = sum(layer.lora_A["default"].weight.grad for layer in layers)
        found[f"dora_gradient.{name}.lora_B"] = torch.cat([layer.lora_B["default"].weight.grad for layer in layers])
    adapter = model.peft_config["default"].to_dict()
    adapter["target_modules"] = sorted(adapter["target_modules"])  # a set there: another order in every process
    with tempfile.TemporaryDirectory() as folder:
        Flux2KleinPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=adapter,
        )
        data = (Path(folder) / "pytorch_lora_weights.safetensors").read_bytes()
        (out / "lora-dora.safetensors").write_bytes(data)
    return {**found, "dora_loss": value.detach(), "dora_velocity": velocity(model)}


def velocity(model: Flux2Transformer2DModel) -> torch.Tensor:
    """Return the model's velocity."""
    with torch.no_grad():
        return model(**inputs(2), **ids(), return_dict=False)[0]


def lokr_parts() -> dict[str, mx.array]:
    """Return LoKr factors of every linear of the blocks, none of them zero."""
    generator = torch.Generator().manual_seed(23)
    found = {}
    for name, shape in LINEARS.items():
        for part, array in lokr.fresh_parts(shape, RANK, LoKr(factor=FACTOR).factor, seed=0, module=name).items():
            found[f"{name}.{part}"] = mx.array((torch.randn(array.shape, generator=generator) * 0.3).numpy())
    return found


def kron() -> dict[str, torch.Tensor]:
    """Return LoKr factors, and velocity, loss and gradients of the model with them, loaded by diffusers."""
    parts = lokr_parts()
    pipeline = Flux2KleinPipeline(None, None, None, None, tiny(guidance_embeds=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lokr.safetensors"
        mx.save_safetensors(str(path), bfl.to_tensors(parts, dtype=mx.float32), bfl.metadata(RANK, {}))
        pipeline.load_lora_weights(folder, weight_name=path.name)
    model = pipeline.transformer
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lokr_" in parameter_name)
    value = loss(model, batch())
    value.backward()
    found = {f"lokr.{name}": torch.tensor(np.array(array)) for name, array in parts.items()}
    for name in parts:
        module, _, part = name.rpartition(".")
        (factor,) = getattr(model.get_submodule(lokr_source(module)), part).values()
        found[f"lokr_gradient.{name}"] = factor.grad
    return {**found, "lokr_loss": value.detach(), "lokr_velocity": velocity(model)}


def lokr_source(module: str) -> str:
    """Return the diffusers module of a linear, q, k and v being one."""
    inner = module.partition(".")[2].partition(".")[2]
    index = module.split(".")[1]
    return f"transformer_blocks.{index}.{FUSED[inner]}" if inner in FUSED else diffusers_modules(module)[0]


def pissa() -> dict[str, torch.Tensor]:
    """Return a weight with singular values that fall by 0.8 each, and what PiSSA takes out of it."""
    generator = torch.Generator().manual_seed(29)
    left, right = (torch.linalg.qr(torch.randn(size, 40, generator=generator))[0] for size in (48, 40))
    layer = torch.nn.Linear(40, 48, bias=False)
    layer.weight.data = left * 0.8 ** torch.arange(40) @ right.T
    weight = layer.weight.data.clone()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="pissa")
    inner = get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    product = (inner.lora_B["default"].weight @ inner.lora_A["default"].weight).detach()
    return {"pissa_weight": weight, "pissa_product": product, "pissa_rest": inner.base_layer.weight.detach()}


def record(out: Path) -> None:
    """Write adapters.npz and lora-dora.safetensors."""
    arrays = {**dora(out), **kron(), **pissa()}
    splits = [(size, factor, *factorization(size, factor)) for size, factor in itertools.product(SIZES, FACTORS)]
    np.savez_compressed(
        out / "adapters.npz",
        splits=np.array(splits, dtype=np.int32),
        **{name: array.numpy() for name, array in arrays.items()},
    )
