"""The memory estimate against measured peaks, what it advises, and the signs of running out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from schemas.adapter import DoRA, LoKr, LoRA
from schemas.ema import Ema
from schemas.errors import NoResources
from schemas.optimizers import AdamW
from schemas.quantize import Quantize
from schemas.train import Train
from stages.bench import random_transformer
from stages.flux2.autoencoder import Autoencoder
from stages.flux2.backend import Backend
from stages.flux2.packing import packed_modules
from stages.flux2.positions import rope
from stages.flux2.quantize import fill
from stages.flux2.shapes import text_encoder_shapes, transformer_shapes
from stages.flux2.text.qwen3 import Qwen3
from stages.flux2.transformer import Transformer
from stages.flux2.variants import MICRO, VARIANTS, AutoencoderConfig, TextEncoderConfig, TransformerConfig
from stages.lora.formats.bfl import to_tensors
from stages.lora.merge import attach, portable
from stages.training import memory
from stages.training.memory import (
    Demand,
    Sizes,
    advice,
    estimate,
    latents_peak,
    preview_peak,
    require,
    require_text,
    sizes,
    text_peak,
)
from stages.training.objective import Batch
from stages.training.step import Trainer

# (model, px, checkpointing, GB): MLX's own peak on one H200, bf16, rank 16, batch 1, mlx 0.32.4, 2026-11.
MEASURED = [
    ("klein-base-9b", 512, "none", False, 30.48),
    ("klein-base-9b", 512, "none", True, 22.12),
    ("klein-base-9b", 1024, "none", False, 51.18),
    ("klein-base-9b", 1024, "none", True, 26.72),
    ("klein-base-9b", 512, "8bit", False, 23.25),
    ("klein-base-9b", 512, "8bit", True, 15.24),
    ("klein-base-9b", 1024, "8bit", False, 43.29),
    ("klein-base-9b", 1024, "8bit", True, 19.01),
    ("klein-base-9b", 512, "4bit", False, 18.79),
    ("klein-base-9b", 512, "4bit", True, 10.88),
    ("klein-base-9b", 1024, "4bit", False, 39.19),
    ("klein-base-9b", 1024, "4bit", True, 14.65),
    ("klein-base-4b", 512, "none", False, 15.70),
    ("klein-base-4b", 512, "none", True, 11.03),
    ("klein-base-4b", 1024, "none", False, 27.84),
    ("klein-base-4b", 1024, "none", True, 14.21),
    ("klein-base-4b", 512, "8bit", False, 12.87),
    ("klein-base-4b", 512, "8bit", True, 8.26),
    ("klein-base-4b", 1024, "8bit", False, 24.64),
    ("klein-base-4b", 1024, "8bit", True, 11.10),
    ("klein-base-4b", 512, "4bit", False, 11.12),
    ("klein-base-4b", 512, "4bit", True, 6.51),
    ("klein-base-4b", 1024, "4bit", False, 22.80),
    ("klein-base-4b", 1024, "4bit", True, 9.26),
    ("dev", 512, "4bit", False, 50.50),
    ("dev", 512, "4bit", True, 27.24),
    ("dev", 1024, "4bit", False, 101.84),
    ("dev", 1024, "4bit", True, 34.63),
    ("dev", 512, "8bit", False, 66.20),
    ("dev", 512, "8bit", True, 42.95),
    ("dev", 1024, "8bit", False, 117.54),
    ("dev", 1024, "8bit", True, 50.33),
    ("dev", 512, "none", False, 93.70),
    ("dev", 512, "none", True, 70.80),
    ("dev", 1024, "none", False, 143.79),
    ("dev", 1024, "none", True, 78.42),
]
# Encoding 512 tokens: (model, quantize, GB).
TEXT = [
    ("klein-4b", "none", 7.16),
    ("klein-4b", "8bit", 7.06),
    ("klein-4b", "4bit", 5.20),
    ("klein-9b", "none", 12.54),
    ("klein-9b", "8bit", 10.43),
    ("klein-9b", "4bit", 8.31),
    ("dev", "none", 35.19),
    ("dev", "8bit", 24.02),
    ("dev", "4bit", 15.66),
]
# The autoencoder of all of them, a square picture: (px, encoding, decoding), GB.
AUTOENCODER = [
    (512, 2.21, 4.34),
    (1024, 5.67, 7.46),
    (2048, 20.59, None),
]
SMALL = TransformerConfig(
    num_layers=1,
    num_single_layers=3,
    num_attention_heads=4,
    joint_attention_dim=96,
    attention_head_dim=64,
    in_channels=32,
    axes_dims_rope=(16, 16, 16, 16),
)


def demand(model: str, size_px: int, *, checkpointing: bool, batch: int = 1, quantize: Quantize = "none") -> Demand:
    config = VARIANTS[model].transformer
    packed = packed_modules(transformer_shapes(config), quantize)
    tokens = (size_px // 16) ** 2
    return Demand(config, "cuda", parts_of(model), tokens, 512, batch, 16, checkpointing, packed)


@lru_cache
def parts_of(model: str) -> memory.Sizes:
    return sizes(VARIANTS[model], Train(), mx.bfloat16)


@pytest.mark.parametrize(("model", "size_px", "quantize", "checkpointing", "gigabytes"), MEASURED)
def test_estimate_of_a_step_is_near_the_gpu(
    model: str, size_px: int, quantize: Quantize, gigabytes: float, *, checkpointing: bool
) -> None:
    found = estimate(demand(model, size_px, checkpointing=checkpointing, quantize=quantize))
    assert found == pytest.approx(gigabytes * 1e9, rel=memory.TOLERANCE if checkpointing else 0.06)


@pytest.mark.parametrize(("model", "quantize", "gigabytes"), TEXT)
def test_estimate_of_encoding_text_is_near_the_gpu(model: str, quantize: Quantize, gigabytes: float) -> None:
    config = VARIANTS[model].text_encoder
    found = text_peak(config, packed_modules(text_encoder_shapes(config), quantize), "cuda")
    assert found == pytest.approx(gigabytes * 1e9, rel=0.1)


@pytest.mark.parametrize(("size_px", "encoding", "decoding"), AUTOENCODER)
def test_estimate_of_the_autoencoder_is_near_the_gpu(size_px: int, encoding: float, decoding: float | None) -> None:
    variant = VARIANTS["klein-base-4b"]
    assert latents_peak(variant.autoencoder, "cuda", size_px**2) == pytest.approx(encoding * 1e9, rel=0.1)
    if decoding:
        weights = memory.held(transformer_shapes(variant.transformer), {}, "cuda")
        assert preview_peak(variant, {}, "cuda", size_px) - weights == pytest.approx(decoding * 1e9, rel=0.1)


WIDE = replace(SMALL, num_attention_heads=12, num_single_layers=4)


# MLX multiplies with packed matrices slowly on a CPU: half of those with --full only.
STEPS = [
    (SMALL, "none", False),
    (SMALL, "none", True),
    (SMALL, "4bit", True),
    (WIDE, "8bit", True),
    (WIDE, "4bit", False),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in ((SMALL, "4bit", False), (WIDE, "8bit", False), (WIDE, "4bit", True))
    ),
    *(pytest.param(WIDE, "nvfp4", checkpointing, marks=pytest.mark.full) for checkpointing in (False, True)),
]


@pytest.mark.parametrize(("config", "quantize", "checkpointing"), STEPS)
def test_estimate_is_near_the_peak_on_this_cpu(
    config: TransformerConfig, quantize: Quantize, *, checkpointing: bool
) -> None:
    settings, variant = Train(gradient_checkpointing=checkpointing), replace(MICRO, transformer=config)
    mx.clear_cache()
    before = mx.get_active_memory()
    transformer = random_transformer(variant, mx.float32, quantize)
    attach(transformer, settings, seed=0)
    trainer = Trainer(transformer, settings, 0)
    latents = mx.random.normal((1, 32, 20, 20))
    batch = Batch(latents, latents, mx.random.normal((1, 64, 96)), 0.5 * mx.ones((1,)), mx.ones((1,)))
    for _ in range(2):
        mx.reset_peak_memory()
        trainer.step([batch])
        mx.eval(trainer.state())
    parts, packed = sizes(variant, settings, mx.float32), packed_modules(transformer_shapes(config), quantize)
    found = estimate(Demand(config, "cpu", parts, 400, 64, 1, 16, checkpointing, packed))
    assert found == pytest.approx(mx.get_peak_memory() - before, rel=memory.TOLERANCE)


def peak(module: nn.Module, call: Callable[[], mx.array]) -> int:
    """Return the bytes of a module's weights, and of the peak of a call above what was there before it."""
    mx.eval(module.parameters())
    mx.eval(call())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call())
    return held_bytes(module) + mx.get_peak_memory() - before


def held_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


@pytest.mark.parametrize(
    ("hidden", "heads", "quantize"), [(256, 4, "none"), (128, 8, "none"), (512, 4, "none"), (512, 4, "8bit")]
)
def test_peak_of_encoding_text_is_near_that_on_this_cpu(hidden: int, heads: int, quantize: Quantize) -> None:
    config = TextEncoderConfig("qwen3", hidden, 4 * hidden, heads, 2, 512, 4, head_dim=64, layers=(1, 2, 3))
    shapes = text_encoder_shapes(config)
    packed = packed_modules(shapes, quantize)
    tensors = ((name, mx.ones(shape) / shape[-1]) for name, shape in shapes.items())
    encoder = fill(Qwen3(config, mx.float32), tensors, mx.float32, found={}, wanted=packed)
    found = peak(encoder, lambda: encoder(mx.zeros((1, 512), mx.int32), mx.array([20])))
    assert text_peak(config, packed, "cpu") == pytest.approx(found, rel=memory.TOLERANCE)


@pytest.mark.parametrize(
    ("widths", "layers"), [((32, 48, 64, 64), 1), ((32, 64, 128, 128), 2), ((16, 64, 64, 64), 2)]
)
def test_peak_of_encoding_latents_is_near_that_on_this_cpu(widths: tuple[int, ...], layers: int) -> None:
    config = replace(AutoencoderConfig(), block_out_channels=widths, layers_per_block=layers, norm_num_groups=16)
    encoder = Autoencoder(config, encoder=True, decoder=False)
    found = peak(encoder, lambda: encoder.encode(mx.zeros((1, 3, 192, 128))))
    assert latents_peak(config, "cpu", 192 * 128) == pytest.approx(found, rel=memory.TOLERANCE)


# The decoder decides, the transformer does.
@pytest.mark.parametrize(("widths", "heads"), [((32, 48, 64, 64), 6), ((8, 8, 8, 8), 12)])
@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_peak_of_drawing_is_near_that_on_this_cpu(widths: tuple[int, ...], heads: int, quantize: Quantize) -> None:
    autoencoder = replace(MICRO.autoencoder, block_out_channels=widths)
    variant = replace(
        MICRO, autoencoder=autoencoder, transformer=replace(MICRO.transformer, num_attention_heads=heads)
    )
    transformer = random_transformer(variant, mx.float32, quantize)
    decoder = Autoencoder(autoencoder, encoder=False, decoder=True)
    channels, tables = autoencoder.packed_channels, rope(variant.transformer, 64, 16, 16)
    image, text = mx.zeros((1, 256, channels)), mx.zeros((1, 64, variant.transformer.joint_attention_dim))
    forward = peak(transformer, lambda: transformer(image, text, mx.array([0.5]), None, tables))
    decoding = peak(decoder, lambda: decoder.decode(mx.zeros((1, channels, 16, 16))))
    found = max(forward + held_bytes(decoder), decoding + held_bytes(transformer))
    packed = packed_modules(transformer_shapes(variant.transformer), quantize)
    assert preview_peak(variant, packed, "cpu", 256) == pytest.approx(found, rel=memory.TOLERANCE)


def test_peaks_of_the_published_models_by_stage() -> None:
    """Gigabytes on CUDA; what a quantized stage saves is its weights."""
    dev = VARIANTS["dev"]
    text = {mode: packed_modules(text_encoder_shapes(dev.text_encoder), mode) for mode in ("none", "8bit", "4bit")}
    found = [round(text_peak(dev.text_encoder, packed, "cuda") / 1e9) for packed in text.values()]
    assert found == [36, 25, 17]
    packed = packed_modules(transformer_shapes(dev.transformer), "4bit")
    assert preview_peak(dev, packed, "cuda", 1024) < preview_peak(dev, {}, "cuda", 1024) - 40e9


@pytest.mark.parametrize(
    "settings",
    [
        Train(),
        Train(rank=4, ema=Ema(), save_dtype="float32"),
        Train(adapter=LoKr()),
        Train(adapter=LoRA(init="pissa")),
    ],
)
def test_sizes_are_those_of_the_real_arrays(settings: Train) -> None:
    transformer = Transformer(SMALL)
    attach(transformer, settings, seed=3)
    trainer = Trainer(transformer, settings, 3)
    file = to_tensors(portable(transformer, trainer.factors), dtype=getattr(mx, settings.save_dtype))
    assert sizes(replace(MICRO, transformer=SMALL), settings, mx.float32) == Sizes(
        state=sum(array.nbytes for array in trainer.state().values()),
        factors=sum(array.nbytes for array in trainer.factors.values()),
        file=sum(array.nbytes for array in file.values()),
    )


def test_sizes_of_dora_are_short_of_its_magnitudes_alone() -> None:
    plain, dora = (sizes(MICRO, Train(adapter=adapter), mx.float32) for adapter in (LoRA(), DoRA()))
    assert plain == dora


def test_sizes_of_the_largest_model_take_no_memory() -> None:
    before = mx.get_active_memory()
    parts = sizes(VARIANTS["dev"], Train(optimizer=AdamW()), mx.bfloat16)
    assert parts.state > 1e8
    assert mx.get_active_memory() - before < 1e6


def test_what_fits_is_not_mentioned() -> None:
    said: list[str] = []
    require(demand("klein-base-4b", 512, checkpointing=True), int(17e9), said.append)
    require(demand("klein-base-4b", 512, checkpointing=True), None, said.append)
    assert said == []


def test_what_may_not_fit_is_a_warning_with_advice() -> None:
    said: list[str] = []
    require(demand("klein-base-4b", 1024, checkpointing=True), int(14e9), said.append)
    assert said == [
        'a training step needs about 14.8 GB, there are 14.0 GB; set model.quantize = "8bit" (about 11.9 GB) '
        "or validate.resolutions = [768] (about 12.5 GB)"
    ]


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(NoResources) as refused:
        require(demand("klein-base-9b", 1024, checkpointing=False), int(30e9), print)
    fault = refused.value.faults[0]
    assert fault.code == "memory.too_little"
    assert fault.why == "a training step needs about 51.1 GB, there are 30.0 GB"
    assert fault.fix == (
        "set train.gradient_checkpointing = true (about 28.0 GB) or validate.resolutions = [384] (about 27.3 GB)"
    )


def test_advice_names_the_fewest_settings_that_fit_together() -> None:
    large = demand("klein-base-4b", 1024, checkpointing=False, batch=4)
    assert advice(large, int(12.5e9)) == (
        'set train.gradient_checkpointing = true and train.batch_size = 1 and model.quantize = "8bit" (about 11.9 GB)'
    )


def test_advice_says_when_no_setting_is_enough() -> None:
    found = advice(demand("dev", 512, checkpointing=True), int(24e9))
    assert found.startswith("take a smaller model, or a machine with 27")


def text_refused(limit: float, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    config = VARIANTS["dev"].text_encoder
    monkeypatch.setattr(memory, "device_bytes", lambda _: int(limit))
    require_text(config, {}, Backend("cuda", mx.bfloat16), said.append)


def test_text_encoder_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    text_refused(36e9, monkeypatch, said)
    assert said == []
    text_refused(33e9, monkeypatch, said)
    assert said == ['encoding text needs about 35.6 GB, there are 33.0 GB; set encode_text.quantize = "8bit"']
    for limit, fix in ((27e9, 'set encode_text.quantize = "8bit"'), (18e9, 'set encode_text.quantize = "4bit"')):
        with pytest.raises(NoResources) as refused:
            text_refused(limit, monkeypatch, said)
        assert refused.value.faults[0].fix == fix
    with pytest.raises(NoResources, match=r"take a machine with 16\.\d GB for it"):
        text_refused(8e9, monkeypatch, said)


def test_large_rank_is_lowered_where_that_is_enough() -> None:
    large = demand("klein-base-4b", 512, checkpointing=True)
    parts = sizes(VARIANTS["klein-base-4b"], Train(rank=512), mx.bfloat16)
    found = advice(replace(large, rank=512, sizes=parts), int(20e9))
    assert found == "set train.rank = 16 (about 10.9 GB)"


def test_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.device_bytes(Backend("cpu", mx.float32))
    assert whole is not None
    assert whole > 1e9
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
    assert memory.device_bytes(Backend("cpu", mx.float32)) == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.device_bytes(Backend("cpu", mx.float32)) == whole
