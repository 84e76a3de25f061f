"""Every foreign spelling of a tensor's name, as rules between canonical names and those in files.

A canonical tensor is an ordered list of pieces of a file's tensors: BFL's fused qkv is the rows of three diffusers
matrices, and BFL's final modulation holds shift before scale where diffusers holds scale before shift. The table of
renames is that of `scripts/convert_flux2_to_diffusers.py` in huggingface/diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from stages.flux2.variants import AutoencoderConfig, TextEncoderConfig

FINAL_MODULATION = "final_layer.adaLN_modulation.1"
# What tools put before every name of a part, also of several parts in one file.
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
# The tokenizer, as ComfyUI's files of a text encoder carry it along.
TOKENIZERS = ("tekken_model", "spiece_model", "tokenizer_json")

# Canonical module -> the diffusers modules whose rows it stacks.
WHOLE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    FINAL_MODULATION: ("norm_out.linear",),
}
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# (prefix here, prefix in diffusers, modules below it)
SCOPES = (
    (r"", r"", WHOLE),
    (r"double_blocks.{}.", r"transformer_blocks.{}.", DOUBLE),
    (r"single_blocks.{}.", r"single_transformer_blocks.{}.", SINGLE),
)
# Applied one after the other to a canonical autoencoder name; `up` is reversed besides.
AUTOENCODER_RULES = (
    (r"^encoder\.quant_conv", "quant_conv"),
    (r"^decoder\.post_quant_conv", "post_quant_conv"),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
)


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in a file: the `index`-th of `of` equal parts."""

    name: str
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Component:
    """How files spell one part of the model.

    `plain` undoes spellings that change no structure; each of `spellings` gives the pieces of a canonical tensor by
    plain names; `unused` says which plain names a file may hold that nobody reads.
    """

    plain: Callable[[str], str]
    spellings: tuple[Callable[[str], tuple[Piece, ...]], ...]
    unused: Callable[[str], bool]


def diffusers_modules(module: str) -> list[str]:
    """Return the diffusers modules whose rows a canonical transformer module stacks. `KeyError` if unknown."""
    index = "".join(re.findall(r"_blocks\.(\d+)\.", module))
    for here, there, modules in SCOPES:
        name = module.removeprefix(here.format(index))
        if name in modules and module == here.format(index) + name:
            return [there.format(index) + source for source in modules[name]]
    raise KeyError(module)


def canonical_pieces(name: str) -> tuple[Piece, ...]:
    """Return the tensor itself: the spelling of BFL's files."""
    return (Piece(name),)


def diffusers_transformer_pieces(name: str) -> tuple[Piece, ...]:
    """Return the pieces of a canonical transformer tensor in diffusers' spelling."""
    module = name.rpartition(".")[0]
    sources = [f"{source}.weight" for source in diffusers_modules(module)]
    if module == FINAL_MODULATION:
        return (Piece(sources[0], 1, 2), Piece(sources[0], 0, 2))
    return tuple(Piece(source) for source in sources)


def diffusers_autoencoder_name(name: str, levels: int) -> str:
    """Return a canonical autoencoder tensor's name in diffusers, whose decoder counts its `levels` the other way."""
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in AUTOENCODER_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def plain_transformer_name(name: str) -> str:
    """Drop a tool's prefix; call the scale of a norm `scale`, as BFL's first files did."""
    return re.sub(r"\.(query_norm|key_norm)\.weight$", r".\1.scale", _without(TRANSFORMER_PREFIXES, name))


def plain_autoencoder_name(name: str) -> str:
    """Drop a tool's prefix."""
    return _without(AUTOENCODER_PREFIXES, name)


def plain_text_encoder_name(name: str) -> str:
    """Drop what wraps the language model of a model that also sees; name one saved without its head as others are."""
    name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
    return re.sub(r"^(?=(?:layers|embed_tokens|norm)\.)", "model.", name.removeprefix("language_model."))


def _without(prefixes: tuple[str, ...], name: str) -> str:
    """Return the name without the prefix it has, if it has one."""
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)


TRANSFORMER = Component(
    plain=plain_transformer_name,
    spellings=(canonical_pieces, diffusers_transformer_pieces),
    unused=lambda _: False,
)


def autoencoder(config: AutoencoderConfig, *, encoder: bool, decoder: bool) -> Component:
    """Return how files spell the autoencoder; a half that is not asked for is unused."""
    halves = [
        half for half, used in ((r"encoder|quant_conv", encoder), (r"decoder|post_quant_conv", decoder)) if not used
    ]
    unused = re.compile("|".join([r"bn\.num_batches_tracked$", *(rf"(?:{half})\." for half in halves)]))
    levels = len(config.block_out_channels)
    return Component(
        plain=plain_autoencoder_name,
        spellings=(canonical_pieces, lambda name: (Piece(diffusers_autoencoder_name(name, levels)),)),
        unused=lambda name: unused.match(name) is not None,
    )


def text_encoder(config: TextEncoderConfig) -> Component:
    """Return how files spell the text encoder; what lies past the highest hidden state is unused."""
    other = re.compile(r"model\.norm\.|lm_head\.|(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
    layer = re.compile(r"model\.layers\.(\d+)\.")

    def unused(name: str) -> bool:
        match = layer.match(name)
        return int(match[1]) >= max(config.layers) if match else name in TOKENIZERS or other.match(name) is not None

    return Component(plain=plain_text_encoder_name, spellings=(canonical_pieces,), unused=unused)
