"""The built-in model `flux2-micro`: a whole, trained FLUX.2 in the diffusers layout; the package brings its weights.

Everything is real but the size: two kinds of blocks, Qwen3, autoencoder, tokenizer; 7.8 million parameters, 15.6 MB.
It draws a small world of coloured shapes as its captions say (`stages/world`), at 96 to 128 px. The weights are what
`flux2-lora pretrain` left (pipelines/micro), beside the report of that training, which holds their digests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import Damaged
from stages.contract.digests import sha256_file
from stages.flux2.micro_tokenizer import ADDED_TOKENS
from stages.flux2.text.prompts import PROMPT, QWEN3, Control
from stages.flux2.variants import MICRO, AutoencoderConfig, TextEncoderConfig, TransformerConfig, Variant

# The files of a trained model that lie side by side, by the part they are of.
TRANSFORMER, AUTOENCODER, TEXT_ENCODER = "transformer.safetensors", "vae.safetensors", "text_encoder.safetensors"
TOKENIZER = "tokenizer.json"
PARTS = {"transformer": TRANSFORMER, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER}
REPORT = "report.json"
WEIGHTS = Path(__file__).parent / "micro_weights"


def make_micro(folder: Path, weights: Path = WEIGHTS) -> None:
    """Write the model's files below `folder`, which must hold none of them: the same bytes every time, everywhere.

    Raises `Damaged` if one of the packed files in `weights` is not what its report says.
    """
    digests = packed_digests(weights)
    for name in (*PARTS.values(), TOKENIZER):
        found = sha256_file(weights / name) if (weights / name).is_file() else "no file"
        if found != digests.get(name):
            raise _damaged(weights / name, f"expected sha256 {digests.get(name)}, found {found}")
    assemble(weights, MICRO, folder)


def packed_digests(weights: Path) -> dict[str, str]:
    """Return the sha256 of each packed file by its name, as the report beside them says. Raises `Damaged`."""
    path = weights / REPORT
    try:
        report = msgspec.json.decode(path.read_bytes(), type=_Report)
    except (FileNotFoundError, *UNREADABLE) as error:
        raise _damaged(path, str(error)) from error
    return {name: file.sha256 for name, file in report.files.items()}


class _File(msgspec.Struct):
    sha256: str


class _Report(msgspec.Struct):
    files: dict[str, _File]


def _damaged(path: Path, why: str) -> Damaged:
    return Damaged(
        "model.builtin_damaged",
        "a file of the built-in model is not what was packed",
        where=str(path),
        why=why,
        fix="install flux2-lora again",
    )


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
