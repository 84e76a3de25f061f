"""The built-in model `flux2-micro`: a whole FLUX.2 in the diffusers layout, made on the spot in under a second.

Everything is real but the size: two kinds of blocks, Qwen3, autoencoder, tokenizer; 6.8 million parameters, 13.7 MB.
The weights are random (see `micro_draws`), except that the autoencoder carries colours (see `micro_autoencoder`).
Nothing was trained, so its pictures are soft patches of colour. A LoRA on it learns a data set's colours and rough
layout: rank 16, batch 4 and learning rate 2e-3 took the loss from 1.7 to 0.94 within 300 steps on twelve pictures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from stages.flux2.micro_autoencoder import autoencoder_weights
from stages.flux2.micro_draws import linear, normal
from stages.flux2.micro_tokenizer import ADDED_TOKENS, tokenizer_json
from stages.flux2.text.prompts import PROMPT, QWEN3, Control
from stages.flux2.variants import MICRO, AutoencoderConfig, TextEncoderConfig, TransformerConfig, Variant
from stages.stores.tensors import Tensor, save

Weights = dict[str, np.ndarray]

# Bump when the bytes change on purpose: caches name the model by its bytes, people by this.
VERSION = 1

# The files of a trained model that lie side by side, by the part they are of.
TRANSFORMER, AUTOENCODER, TEXT_ENCODER = "transformer.safetensors", "vae.safetensors", "text_encoder.safetensors"
TOKENIZER = "tokenizer.json"
PARTS = {"transformer": TRANSFORMER, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER}


def make_micro(folder: Path) -> None:
    """Write the model's files below `folder`, which must hold none of them: the same bytes every time, everywhere."""
    write_configs(folder, MICRO)
    parts = {
        "transformer": transformer_weights(MICRO.transformer),
        "vae": autoencoder_weights(MICRO.autoencoder),
        "text_encoder": text_encoder_weights(MICRO.text_encoder),
    }
    for name, weights in parts.items():
        save(folder / name / weights_file(name), stored(weights), {"format": "pt"})
    write_json(folder / "tokenizer" / "tokenizer.json", tokenizer_json(MICRO.text_encoder.vocab_size))


def write_configs(folder: Path, variant: Variant) -> None:
    """Make the folders of a model of these dimensions below `folder`, with everything but weights and vocabulary."""
    contents = {
        "transformer/config.json": _transformer_config(variant.transformer),
        "vae/config.json": _autoencoder_config(variant.autoencoder),
        "text_encoder/config.json": _text_encoder_config(variant.text_encoder),
        "tokenizer/tokenizer_config.json": _tokenizer_config(variant.text_encoder),
        "scheduler/scheduler_config.json": _SCHEDULER,
        "model_index.json": _MODEL_INDEX,
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, content)


def assemble(parts: Path, variant: Variant, folder: Path) -> None:
    """Write a model of these dimensions below `folder`, of the files that training left in the folder `parts`."""
    write_configs(folder, variant)
    for part, name in PARTS.items():
        shutil.copyfile(parts / name, folder / part / weights_file(part))
    shutil.copyfile(parts / TOKENIZER, folder / "tokenizer" / TOKENIZER)


def weights_file(part: str) -> str:
    """Return the name of a part's weights in its folder."""
    return "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"


def transformer_weights(config: TransformerConfig) -> Weights:
    """Return every tensor of the transformer as float32, in diffusers' names."""
    width, channels, vector = config.inner_dim, config.in_channels, config.timestep_guidance_channels
    time, modulation = "time_guidance_embed.timestep_embedder", "stream_modulation"
    shapes = {
        "x_embedder": (width, channels, 1.0),
        "context_embedder": (width, config.joint_attention_dim, 0.5),
        f"{time}.linear_1": (width, vector, 2.0),
        f"{time}.linear_2": (width, width, 2.0),
        f"double_{modulation}_img.linear": (6 * width, width, MODULATION),
        f"double_{modulation}_txt.linear": (6 * width, width, MODULATION),
        f"single_{modulation}.linear": (3 * width, width, MODULATION),
        "norm_out.linear": (2 * width, width, MODULATION),
        "proj_out": (channels, width, 0.5),
    }
    for i in range(config.num_layers):
        shapes |= _double_block(f"transformer_blocks.{i}", width, config.mlp_dim)
    for i in range(config.num_single_layers):
        block = f"single_transformer_blocks.{i}.attn"
        shapes[f"{block}.to_qkv_mlp_proj"] = (3 * width + 2 * config.mlp_dim, width, 1.0)
        shapes[f"{block}.to_out"] = (width, width + config.mlp_dim, 0.5)
    weights = _linears(shapes)
    blocks = [f"transformer_blocks.{i}.attn.norm_{part}" for i in range(config.num_layers) for part in _DOUBLE_NORMS]
    blocks += [f"single_transformer_blocks.{i}.attn.norm_{p}" for i in range(config.num_single_layers) for p in "qk"]
    return weights | {f"{name}.weight": np.ones(config.attention_head_dim, np.float32) for name in blocks}


def text_encoder_weights(config: TextEncoderConfig) -> Weights:
    """Return every tensor of the language model as float32, in Hugging Face's names; the head is the embedding."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    embedding = "model.embed_tokens.weight"
    weights = {embedding: normal(embedding, config.vocab_size, hidden, deviation=1.0)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        weights |= _linears(
            {
                f"{layer}.self_attn.q_proj": (queries, hidden, 1.0),
                f"{layer}.self_attn.k_proj": (keys, hidden, 1.0),
                f"{layer}.self_attn.v_proj": (keys, hidden, 1.0),
                f"{layer}.self_attn.o_proj": (hidden, queries, 0.5),
                f"{layer}.mlp.gate_proj": (inner, hidden, 1.0),
                f"{layer}.mlp.up_proj": (inner, hidden, 1.0),
                f"{layer}.mlp.down_proj": (hidden, inner, 0.5),
            }
        )
        weights |= {f"{layer}.self_attn.{norm}.weight": np.ones(size, np.float32) for norm in ("q_norm", "k_norm")}
        weights |= {f"{layer}.{norm}.weight": np.ones(hidden, np.float32) for norm in _LAYER_NORMS}
    return weights | {"model.norm.weight": np.ones(hidden, np.float32)}


# Gain of the modulation: its outputs deviate by about a quarter, enough for a LoRA in a block to reach the picture.
MODULATION = 0.2
_DOUBLE_NORMS = ("q", "k", "added_q", "added_k")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def _double_block(name: str, width: int, mlp: int) -> dict[str, tuple[int, int, float]]:
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    shapes = {f"{name}.attn.{part}": (width, width, 1.0) for part in projections}
    shapes |= {f"{name}.attn.{part}": (width, width, 0.5) for part in ("to_out.0", "to_add_out")}
    for part in ("ff", "ff_context"):
        shapes[f"{name}.{part}.linear_in"] = (2 * mlp, width, 1.0)
        shapes[f"{name}.{part}.linear_out"] = (width, mlp, 0.5)
    return shapes


def _linears(shapes: dict[str, tuple[int, int, float]]) -> Weights:
    return {
        f"{name}.weight": linear(f"{name}.weight", outputs, inputs, gain)
        for name, (outputs, inputs, gain) in shapes.items()
    }


def stored(weights: Weights) -> dict[str, Tensor]:
    """Return the tensors as they are saved: bfloat16, but batch-norm statistics as they are."""
    return {
        name: _statistic(values) if name.startswith("bn.") else Tensor("BF16", _bfloat16_bits(values))
        for name, values in weights.items()
    }


def _statistic(values: np.ndarray) -> Tensor:
    return Tensor("I64" if values.dtype == np.int64 else "F32", values)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON, the same bytes everywhere."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


_MODEL_INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.37.0",
    "is_distilled": False,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}

_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _transformer_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers,
        "attention_head_dim": config.attention_head_dim,
        "num_attention_heads": config.num_attention_heads,
        "joint_attention_dim": config.joint_attention_dim,
        "timestep_guidance_channels": config.timestep_guidance_channels,
        "mlp_ratio": config.mlp_ratio,
        "axes_dims_rope": list(config.axes_dims_rope),
        "rope_theta": int(config.rope_theta),
        "eps": config.eps,
        "guidance_embeds": config.guidance_embeds,
    }


def _autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLFlux2",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": 1024,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": config.mid_block_add_attention,
        "batch_norm_eps": config.batch_norm_eps,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
    }


def _text_encoder_config(config: TextEncoderConfig) -> dict[str, Any]:
    ids = {spelling: config.vocab_size - len(ADDED_TOKENS) + i for i, spelling in enumerate(ADDED_TOKENS)}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": int(config.rope_theta),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }


def _tokenizer_config(config: TextEncoderConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": config.length,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "padding_side": "right",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": _chat_template(),
    }


def _chat_template() -> str:
    """Return the template as Jinja, for other programs: one user message, thinking off."""
    spelled = (piece.spelling if isinstance(piece, Control) else piece.text for piece in QWEN3.pieces)
    # One expression: Jinja drops a line end at the end of literal text.
    before, after = (part.replace("\n", "\\n") for part in "".join(spelled).split(PROMPT))
    return f"{{{{ '{before}' + messages[0].content + '{after}' }}}}"
