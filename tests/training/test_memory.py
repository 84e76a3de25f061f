"""The memory estimate against measured peaks, what it advises, and the signs of running out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from schemas.adapter import DoRA, LoKr, LoRA
from schemas.ema import Ema
from schemas.errors import NoResources
from schemas.optimizers import AdamW
from schemas.train import Train
from stages.flux2.backend import Backend
from stages.flux2.transformer import Transformer
from stages.flux2.variants import MICRO, VARIANTS, TransformerConfig
from stages.lora.formats.bfl import to_tensors
from stages.lora.merge import attach, portable
from stages.training import memory
from stages.training.memory import Demand, Sizes, advice, estimate, require, sizes
from stages.training.objective import Batch
from stages.training.step import Trainer

# (model, px, checkpointing, GB): MLX's own peak on one H200, bf16, rank 16, batch 1, mlx 0.32.4, 2026-11.
MEASURED = [
    ("klein-base-4b", 512, False, 20.64),
    ("klein-base-4b", 512, True, 16.95),
    ("klein-base-4b", 1024, False, 34.30),
    ("klein-base-4b", 1024, True, 20.95),
    ("klein-base-9b", 512, False, 35.91),
    ("klein-base-9b", 512, True, 28.36),
    ("klein-base-9b", 1024, False, 57.62),
    ("klein-base-9b", 1024, True, 33.25),
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


def demand(model: str, size_px: int, *, checkpointing: bool, batch: int = 1) -> Demand:
    parts = sizes(VARIANTS[model], Train(), mx.bfloat16)
    tokens = (size_px // 16) ** 2
    return Demand(VARIANTS[model].transformer, "cuda", parts, tokens, 512, batch, 16, checkpointing)


@pytest.mark.parametrize(("model", "size_px", "checkpointing", "gigabytes"), MEASURED)
def test_estimate_is_within_three_percent_of_the_gpu(
    model: str, size_px: int, gigabytes: float, *, checkpointing: bool
) -> None:
    found = estimate(demand(model, size_px, checkpointing=checkpointing))
    assert found == pytest.approx(gigabytes * 1e9, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_near_the_peak_on_this_cpu(*, checkpointing: bool) -> None:
    settings = Train(gradient_checkpointing=checkpointing)
    before = mx.get_active_memory()
    transformer = Transformer(SMALL)
    mx.eval(transformer.parameters())
    attach(transformer, settings, seed=0)
    trainer = Trainer(transformer, settings, 0)
    latents = mx.random.normal((1, 32, 20, 20))
    batch = Batch(latents, latents, mx.random.normal((1, 64, 96)), 0.5 * mx.ones((1,)), mx.ones((1,)))
    for _ in range(2):
        mx.reset_peak_memory()
        trainer.step([batch])
        mx.eval(trainer.state())
    parts = sizes(replace(MICRO, transformer=SMALL), settings, mx.float32)
    found = estimate(Demand(SMALL, "cpu", parts, 400, 64, 1, 16, checkpointing))
    assert found == pytest.approx(mx.get_peak_memory() - before, rel=memory.TOLERANCE)


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
    weights = sum(array.nbytes for array in _arrays(transformer))
    attach(transformer, settings, seed=3)
    trainer = Trainer(transformer, settings, 3)
    file = to_tensors(portable(transformer, trainer.factors), dtype=getattr(mx, settings.save_dtype))
    assert sizes(replace(MICRO, transformer=SMALL), settings, mx.float32) == Sizes(
        weights=weights,
        state=sum(array.nbytes for array in trainer.state().values()),
        factors=sum(array.nbytes for array in trainer.factors.values()),
        file=sum(array.nbytes for array in file.values()),
    )


def _arrays(transformer: Transformer) -> list[mx.array]:
    return [array for _, array in tree_flatten(transformer.parameters())]


def test_sizes_of_dora_are_short_of_its_magnitudes_alone() -> None:
    plain, dora = (sizes(MICRO, Train(adapter=adapter), mx.float32) for adapter in (LoRA(), DoRA()))
    assert plain == dora


def test_sizes_of_the_largest_model_take_no_memory() -> None:
    before = mx.get_active_memory()
    parts = sizes(VARIANTS["dev"], Train(optimizer=AdamW()), mx.bfloat16)
    assert parts.weights > 60e9
    assert mx.get_active_memory() - before < 1e6


def test_what_fits_is_not_mentioned() -> None:
    said: list[str] = []
    require(demand("klein-base-4b", 512, checkpointing=True), int(17e9), said.append)
    require(demand("klein-base-4b", 512, checkpointing=True), None, said.append)
    assert said == []


def test_what_may_not_fit_is_a_warning_with_advice() -> None:
    said: list[str] = []
    require(demand("klein-base-4b", 1024, checkpointing=True), int(19e9), said.append)
    assert said == [
        "a training step needs about 20.5 GB, there are 19.0 GB; set validate.resolutions = [768] (about 18.3 GB)"
    ]


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(NoResources) as refused:
        require(demand("klein-base-9b", 1024, checkpointing=False), int(36e9), print)
    fault = refused.value.faults[0]
    assert fault.code == "memory.too_little"
    assert fault.why == "a training step needs about 56.8 GB, there are 36.0 GB"
    assert fault.fix == (
        "set train.gradient_checkpointing = true (about 33.7 GB) or validate.resolutions = [384] (about 33.1 GB)"
    )


def test_advice_names_the_fewest_settings_that_fit_together() -> None:
    large = demand("klein-base-4b", 1024, checkpointing=False, batch=4)
    assert advice(large, int(18.5e9)) == (
        "set train.gradient_checkpointing = true and train.batch_size = 1 and validate.resolutions = [768] "
        "(about 18.3 GB)"
    )


def test_advice_says_when_no_setting_is_enough() -> None:
    found = advice(demand("dev", 512, checkpointing=True), int(24e9))
    assert found.startswith("take a smaller model, or a machine with 7")


def test_large_rank_is_lowered_where_that_is_enough() -> None:
    large = demand("klein-base-4b", 512, checkpointing=True)
    parts = sizes(VARIANTS["klein-base-4b"], Train(rank=512), mx.bfloat16)
    found = advice(replace(large, rank=512, sizes=parts), int(20e9))
    assert found == "set train.rank = 16 (about 16.7 GB)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than ..."), True),
        (RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes."), True),
        (RuntimeError("cudaMallocAsync(&buf->data, size, stream) failed: out of memory"), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"), True),
        (MemoryError(), True),
        (RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, *, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.device_bytes(Backend("cpu", mx.float32))
    assert whole is not None
    assert whole > 1e9
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
    assert memory.device_bytes(Backend("cpu", mx.float32)) == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.device_bytes(Backend("cpu", mx.float32)) == whole
