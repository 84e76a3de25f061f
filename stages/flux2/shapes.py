"""The tensors each part of the model consists of, by dimensions: canonical name -> shape as stored in files.

Canonical names are those of BFL for the transformer and the autoencoder, of Hugging Face for the text encoder.
Convolutions are [out, in, kh, kw], as in files. `recognise` goes the other way, from tensors to words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from stages.flux2.variants import VARIANTS, AutoencoderConfig, TextEncoderConfig, TransformerConfig

Shapes = dict[str, tuple[int, ...]]

PREFIX = re.compile(r"^(?:model\.diffusion_model|diffusion_model|first_stage_model|vae|transformer)\.")
ADAPTER = re.compile(r"\.(?:lora|lokr|hada)_|\.dora_scale$|^lora_")
# A tensor that only this other model has; all-in-one files hold the first of theirs beside others.
OTHER_MODELS = (
    ("double_blocks.0.img_mod.lin.weight", "a FLUX.1 transformer"),
    ("distilled_guidance_layer.in_proj.weight", "a Chroma transformer"),
    ("pos_embed.proj.weight", "a Stable Diffusion 3 transformer"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 transformer"),
    ("transformer_blocks.0.norm1.linear.weight", "a FLUX.1 transformer"),
    ("transformer_blocks.0.img_mod.1.weight", "a Qwen-Image transformer"),
    ("label_emb.0.0.weight", "a Stable Diffusion XL model"),
    ("add_embedding.linear_1.weight", "a Stable Diffusion XL model"),
    ("input_blocks.0.0.weight", "a Stable Diffusion 1 or 2 model"),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", "a Stable Diffusion 1 or 2 model"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
    ("tok_embeddings.weight", "a language model in Mistral's own layout, not that of Hugging Face"),
)
# What other tools put beside a matrix that they packed.
PACKINGS = (
    (re.compile(r"\.weight_scale_2$"), "4-bit floats with scales (ComfyUI's nvfp4)"),
    (
        re.compile(r"\.(?:weight_scale|scale_weight|comfy_quant)$|^scaled_fp8$"),
        "8-bit floats with scales (ComfyUI's fp8)",
    ),
    (re.compile(r"\.(?:absmax|quant_map|SCB)$|\.quant_state\."), "integers of bitsandbytes"),
    (re.compile(r"\.(?:qweight|qzeros|wscales)$"), "integers of GPTQ, AWQ or Nunchaku"),
    (re.compile(r"\.weight\._(?:data|scale)$"), "integers of quanto"),
)


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Return every tensor of the transformer."""
    width, mlp, head = config.inner_dim, config.mlp_dim, (config.attention_head_dim,)
    shapes: Shapes = {
        "img_in.weight": (width, config.in_channels),
        "txt_in.weight": (width, config.joint_attention_dim),
        "double_stream_modulation_img.lin.weight": (6 * width, width),
        "double_stream_modulation_txt.lin.weight": (6 * width, width),
        "single_stream_modulation.lin.weight": (3 * width, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.linear.weight": (config.in_channels, width),
    }
    for embedder in ("time_in", "guidance_in") if config.guidance_embeds else ("time_in",):
        shapes[f"{embedder}.in_layer.weight"] = (width, config.timestep_guidance_channels)
        shapes[f"{embedder}.out_layer.weight"] = (width, width)
    for stream in [f"double_blocks.{i}.{kind}" for i in range(config.num_layers) for kind in ("img", "txt")]:
        shapes[f"{stream}_attn.qkv.weight"] = (3 * width, width)
        shapes[f"{stream}_attn.norm.query_norm.scale"] = head
        shapes[f"{stream}_attn.norm.key_norm.scale"] = head
        shapes[f"{stream}_attn.proj.weight"] = (width, width)
        shapes[f"{stream}_mlp.0.weight"] = (2 * mlp, width)
        shapes[f"{stream}_mlp.2.weight"] = (width, mlp)
    for block in [f"single_blocks.{i}" for i in range(config.num_single_layers)]:
        shapes[f"{block}.linear1.weight"] = (3 * width + 2 * mlp, width)
        shapes[f"{block}.linear2.weight"] = (width, width + mlp)
        shapes[f"{block}.norm.query_norm.scale"] = head
        shapes[f"{block}.norm.key_norm.scale"] = head
    return shapes


def autoencoder_shapes(config: AutoencoderConfig, *, encoder: bool = True, decoder: bool = True) -> Shapes:
    """Return the whitening statistics and every tensor of the halves asked for.

    Attention projections are [C, C]: a 1x1 convolution [C, C, 1, 1] in a file is the same matrix.
    """
    shapes: Shapes = {
        "bn.running_mean": (config.packed_channels,),
        "bn.running_var": (config.packed_channels,),
    }
    if encoder:
        shapes |= _encoder_shapes(config)
    if decoder:
        shapes |= _decoder_shapes(config)
    return shapes


def text_encoder_shapes(config: TextEncoderConfig) -> Shapes:
    """Return the token embeddings and the layers up to the highest hidden state in use."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in [f"model.layers.{i}" for i in range(max(config.layers))]:
        shapes[f"{layer}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if config.normalises_queries:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what a file with these tensors looks like, in words, whatever spelling its names have."""
    names = {PREFIX.sub("", name): shape for name, shape in shapes.items()}
    if any(ADAPTER.search(name) for name in names):
        return "a LoRA"
    for marker in ("single_stream_modulation.lin.weight", "single_stream_modulation.linear.weight"):
        if marker in names:
            return _transformer_words(names, names[marker])
    for marker, words in OTHER_MODELS:
        if marker in names:
            return words
    if "encoder.conv_in.weight" in names or "decoder.conv_in.weight" in names:
        return _autoencoder_words(names)
    for name, shape in names.items():
        if name.endswith("embed_tokens.weight"):
            return _language_words(names, shape[-1] if shape else 0)
    return f"an unknown model of {len(names)} tensors"


def packed_elsewhere(dtypes: Mapping[str, str]) -> str | None:
    """Return how another tool packed the weights of a file, in words; None where none did.

    `dtypes` are the types, as files say them, by the names of the tensors.
    """
    for pattern, words in PACKINGS:
        if any(pattern.search(name) for name in dtypes):
            return words
    return "bare 8-bit floats (fp8)" if any(dtype.startswith("F8_") for dtype in dtypes.values()) else None


def _transformer_words(names: Mapping[str, tuple[int, ...]], modulation: tuple[int, ...]) -> str:
    double, single = (
        _count(names, r"(?:double|transformer)_blocks\."),
        _count(names, r"single_(?:transformer_)?blocks\."),
    )
    width = modulation[-1] if modulation else 0
    known = [
        row.name
        for row in VARIANTS.values()
        if (row.transformer.num_layers, row.transformer.num_single_layers) == (double, single)
        and row.transformer.inner_dim == width
    ]
    suffix = f" ({', '.join(known)})" if known else ""
    return f"a FLUX.2 transformer of width {width} with {double} double and {single} single blocks{suffix}"


def _autoencoder_words(names: Mapping[str, tuple[int, ...]]) -> str:
    statistics = names.get("bn.running_mean")
    if statistics is None:
        return "the autoencoder of another model"
    parts = [part for part in ("encoder", "decoder") if f"{part}.conv_in.weight" in names]
    outer = {
        names[end][axis]
        for end, axis in (("encoder.conv_in.weight", 0), ("decoder.conv_out.weight", 1))
        if end in names
    }
    narrow = f", whose decoder is narrow ({min(outer)})" if len(outer) == 2 else ""
    return f"a FLUX.2 autoencoder ({' and '.join(parts)}) of {statistics[0] // 4} latent channels{narrow}"


def _language_words(names: Mapping[str, tuple[int, ...]], width: int) -> str:
    layers = _count(names, r"(?:model\.)?(?:language_model\.)?layers\.")
    known = [row.name for row in VARIANTS.values() if row.text_encoder.hidden_size == width]
    suffix = f" ({', '.join(known)})" if known else ""
    return f"a language model of width {width} with {layers} layers{suffix}"


def _count(names: Iterable[str], prefix: str) -> int:
    return len({match[1] for name in names if (match := re.match(rf"(?:language_model\.)?{prefix}(\d+)\.", name))})


def _encoder_shapes(config: AutoencoderConfig) -> Shapes:
    widths, moments = config.block_out_channels, 2 * config.latent_channels
    last = len(widths) - 1
    shapes = _conv("encoder.conv_in", 3, widths[0], 3)
    for i, width in enumerate(widths):
        before = widths[max(i - 1, 0)]
        for j in range(config.layers_per_block):
            shapes |= _resnet(f"encoder.down.{i}.block.{j}", width if j else before, width)
        if i < last:
            shapes |= _conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    shapes |= _middle("encoder", widths[last], attention=config.mid_block_add_attention)
    shapes |= _norm("encoder.norm_out", widths[last])
    return (
        shapes
        | _conv("encoder.conv_out", widths[last], moments, 3)
        | _conv("encoder.quant_conv", moments, moments, 1)
    )


def _decoder_shapes(config: AutoencoderConfig) -> Shapes:
    widths, latent = config.decoder_channels, config.latent_channels
    last = len(widths) - 1
    shapes = _conv("decoder.post_quant_conv", latent, latent, 1) | _conv("decoder.conv_in", latent, widths[last], 3)
    shapes |= _middle("decoder", widths[last], attention=config.mid_block_add_attention)
    for i, width in enumerate(widths):
        before = widths[min(i + 1, last)]
        for j in range(config.layers_per_block + 1):
            shapes |= _resnet(f"decoder.up.{i}.block.{j}", width if j else before, width)
        if i > 0:
            shapes |= _conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    return shapes | _norm("decoder.norm_out", widths[0]) | _conv("decoder.conv_out", widths[0], 3, 3)


def _middle(half: str, width: int, *, attention: bool) -> Shapes:
    shapes = _resnet(f"{half}.mid.block_1", width, width) | _resnet(f"{half}.mid.block_2", width, width)
    if attention:
        shapes |= _norm(f"{half}.mid.attn_1.norm", width)
        for projection in ("q", "k", "v", "proj_out"):
            shapes[f"{half}.mid.attn_1.{projection}.weight"] = (width, width)
            shapes[f"{half}.mid.attn_1.{projection}.bias"] = (width,)
    return shapes


def _resnet(name: str, before: int, after: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", before) | _conv(f"{name}.conv1", before, after, 3)
    shapes |= _norm(f"{name}.norm2", after) | _conv(f"{name}.conv2", after, after, 3)
    return shapes | (_conv(f"{name}.nin_shortcut", before, after, 1) if before != after else {})


def _conv(name: str, before: int, after: int, size: int) -> Shapes:
    return {f"{name}.weight": (after, before, size, size), f"{name}.bias": (after,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
