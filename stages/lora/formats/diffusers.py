"""diffusers' layout: its own module names under `transformer.`, q, k and v apart."""

from __future__ import annotations

import mlx.core as mx

from stages.flux2.variants import TransformerConfig
from stages.lora.formats.places import Place, Spellings
from stages.lora.layer import Factors

PREFIX = "transformer."
# peft's own prefix, and what some trainers write before diffusers' names.
READ_PREFIXES = (PREFIX, "base_model.model.", "diffusion_model.")
DOUBLE = {
    "attn.to_q": Place("img_attn.qkv", 0),
    "attn.to_k": Place("img_attn.qkv", 1),
    "attn.to_v": Place("img_attn.qkv", 2),
    "attn.add_q_proj": Place("txt_attn.qkv", 0),
    "attn.add_k_proj": Place("txt_attn.qkv", 1),
    "attn.add_v_proj": Place("txt_attn.qkv", 2),
    "attn.to_out.0": Place("img_attn.proj"),
    "attn.to_add_out": Place("txt_attn.proj"),
    "ff.linear_in": Place("img_mlp.0"),
    "ff.linear_out": Place("img_mlp.2"),
    "ff_context.linear_in": Place("txt_mlp.0"),
    "ff_context.linear_out": Place("txt_mlp.2"),
}
SINGLE = {"attn.to_qkv_mlp_proj": Place("linear1"), "attn.to_out": Place("linear2")}


def spellings(config: TransformerConfig) -> Spellings:
    """Return the names this layout gives the linears of the blocks."""
    return {f"{prefix}{name}": place for prefix in READ_PREFIXES for name, place in _names(config).items()}


def to_tensors(factors: Factors, config: TransformerConfig, *, scale: float, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the file's tensors; q, k and v share A's values and take a third of B's rows each: the same function."""
    tensors: dict[str, mx.array] = {}
    for name, (module, third) in _names(config).items():
        if f"{module}.lora_A" in factors:
            up = factors[f"{module}.lora_B"]
            rows = up if third is None else mx.split(up, 3, axis=0)[third]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = factors[f"{module}.lora_A"].astype(dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (rows * scale).astype(dtype)
    return tensors


def _names(config: TransformerConfig) -> Spellings:
    kinds = (
        ("transformer_blocks", "double_blocks", config.num_layers, DOUBLE),
        ("single_transformer_blocks", "single_blocks", config.num_single_layers, SINGLE),
    )
    return {
        f"{theirs}.{index}.{name}": Place(f"{ours}.{index}.{module}", third)
        for theirs, ours, count, names in kinds
        for index in range(count)
        for name, (module, third) in names.items()
    }
