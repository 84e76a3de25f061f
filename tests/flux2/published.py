"""The folders of published models as far as `open_model` looks: their JSON, without a byte of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.flux2.variants import VARIANTS, Variant

Json = dict[str, Any]


def transformer_json(row: Variant) -> Json:
    """As diffusers 0.42.1 writes it."""
    config = row.transformer
    return {
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": "0.42.1",
        "attention_head_dim": config.attention_head_dim,
        "axes_dims_rope": list(config.axes_dims_rope),
        "eps": 1e-06,
        "guidance_embeds": config.guidance_embeds,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.joint_attention_dim,
        "mlp_ratio": 3.0,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers,
        "out_channels": None,
        "patch_size": 1,
        "rope_theta": 2000,
        "timestep_guidance_channels": 256,
    }


def autoencoder_json(row: Variant) -> Json:
    config = row.autoencoder
    return {
        "_class_name": "AutoencoderKLFlux2",
        "act_fn": "silu",
        "batch_norm_eps": 0.0001,
        "block_out_channels": list(config.block_out_channels),
        "decoder_block_out_channels": None,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": 3,
        "patch_size": [2, 2],
    }


def language_json(row: Variant) -> Json:
    config = row.text_encoder
    fields = {
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": int(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if config.kind == "mistral3":
        return {"model_type": "mistral3", "text_config": fields | {"model_type": "mistral"}, "vision_config": {}}
    return fields | {"model_type": "qwen3", "auto_map": {"AutoModel": "evil.Model"}}


def write(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def build(folder: Path, name: str) -> Path:
    """Write the folder of a published model as far as `open_model` looks: no byte of weights."""
    row = VARIANTS[name]
    klein = row.text_encoder.kind == "qwen3"
    index = {"_class_name": "Flux2KleinPipeline" if klein else "Flux2Pipeline", "vae": ["diffusers", "x"]}
    write(folder / "model_index.json", index | ({"is_distilled": True} if row.distilled else {}))
    write(folder / "transformer" / "config.json", transformer_json(row))
    write(folder / "vae" / "config.json", autoencoder_json(row))
    write(folder / "text_encoder" / "config.json", language_json(row))
    for part in ("transformer", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").touch()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write(
        folder / "text_encoder" / "model.safetensors.index.json", {"weight_map": dict(zip("ab", shards, strict=True))}
    )
    for shard in shards:
        (folder / "text_encoder" / shard).touch()
    write(folder / "tokenizer" / "tokenizer.json", {})
    return folder


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
