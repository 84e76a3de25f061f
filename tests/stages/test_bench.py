"""bench: what it prints, and that random weights of a large model are never there unpacked."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import mlx.core as mx
import pytest

from schemas.quantize import Quantize
from stages.bench import random_transformer
from stages.cli import run
from stages.flux2.packing import FORMATS, bytes_of, packed_modules
from stages.flux2.shapes import transformer_shapes
from stages.flux2.variants import KLEIN_4B, VARIANTS


def measured(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, float]]:
    assert run(["bench", *arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)["measured"]


@pytest.mark.parametrize("quantize", ["none", "8bit", "mxfp4"])
def test_steps_are_measured_on_weights_held_as_asked(capfd: pytest.CaptureFixture[str], quantize: Quantize) -> None:
    arguments = ("flux2-micro", "--size", "32", "--size", "64", "--steps", "1", "--quantize", quantize)
    rows = measured(capfd, *arguments)
    assert [row["size_px"] for row in rows] == [32, 32, 64, 64]
    assert [row["gradient_checkpointing"] for row in rows] == [False, True, False, True]
    shapes = transformer_shapes(VARIANTS["flux2-micro"].transformer)
    for row in rows:
        assert row["quantize"] == quantize
        assert row["weight_bytes"] == bytes_of(shapes, packed_modules(shapes, quantize), 4)
        assert row["peak_bytes"] > row["weight_bytes"]
        assert row["milliseconds"] > 0
        assert math.isfinite(row["loss"])


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_random_weights_are_made_packed_matrix_by_matrix(quantize: Quantize) -> None:
    config = replace(KLEIN_4B, num_attention_heads=4, num_layers=4, num_single_layers=20)
    shapes = transformer_shapes(config)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    transformer = random_transformer(replace(VARIANTS["klein-base-4b"], transformer=config), mx.bfloat16, quantize)
    held = mx.get_active_memory() - before
    assert held == pytest.approx(bytes_of(shapes, packed_modules(shapes, quantize), 2), rel=0.01)
    # A draw takes eight bytes a number while it is made.
    largest = 8 * max(map(math.prod, shapes.values()))
    assert mx.get_peak_memory() - before < 1.15 * held + largest
    assert transformer.dtype == mx.bfloat16


def test_every_format_can_be_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    assert f"[none|{'|'.join(FORMATS)}]" in capfd.readouterr().out


def test_side_that_no_picture_has_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "flux2-micro", "--size", "50"]) == 2
    assert capfd.readouterr().err.endswith("(--size 50). fix: say 48\n")
