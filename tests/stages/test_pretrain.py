"""The `pretrain` command, from a recipe to parts, report and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from stages import cli
from stages.contract.digests import sha256_file
from stages.pretraining import trainer

RECIPE = Path(__file__).parents[2] / "pipelines" / "micro" / "recipe.toml"
POOLS = "[{ height = 32, width = 32, count = 8, batch_size = 2, share = 1.0 }]"
TINY = [
    'dtype="float32"',
    f"autoencoder.pools={POOLS}",
    "autoencoder.steps=2",
    "autoencoder.widths=[8, 8, 8, 8]",
    "autoencoder.latent_channels=2",
    f"transformer.pools={POOLS}",
    "transformer.steps=2",
    "evaluation.prompts=2",
    "evaluation.steps=[1, 2]",
    "evaluation.pictures=2",
    "evaluation.of_each_new_shape=1",
]


def pretrain(part: str, output: Path, *changes: str) -> int:
    given = [f"--set={each}" for each in (*TINY, *changes)]
    return cli.run(["pretrain", part, "--recipe", str(RECIPE), "--output", str(output), *given])


def test_recipe_becomes_parts_with_figures_and_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain("all", tmp_path) == 0
    said = capfd.readouterr().err
    assert "autoencoder: 2 steps of 2 asked for" in said
    assert "drawn 32x32, 2 steps, 2 prompts" in said
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert set(report["files"]) == {
        "transformer.safetensors",
        "vae.safetensors",
        "text_encoder.safetensors",
        "tokenizer.json",
    }
    for name, file in report["files"].items():
        assert (sha256_file(tmp_path / name), (tmp_path / name).stat().st_size) == (file["sha256"], file["bytes"])
    assert report["recipe"]["autoencoder"]["widths"] == [8, 8, 8, 8]
    assert report["autoencoder"]["training"]["steps"] == 2
    sizes = report["autoencoder"]["figures"]["sizes"]
    assert list(sizes) == ["32x32"]
    assert set(report["autoencoder"]["figures"]["new_shapes"]) >= {"ell", "holed star"}
    assert [(each["steps"], each["prompts"]) for each in report["transformer"]["drawn"]] == [(1, 2), (2, 2)]
    for sheet in ("reconstructions.png", "samples.png"):
        assert Image.open(tmp_path / sheet).width > 100


def test_transformer_goes_on_where_the_autoencoder_wrote(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain("transformer", tmp_path) == 4
    assert "vae.safetensors" in capfd.readouterr().err
    assert pretrain("autoencoder", tmp_path) == 0
    coder = sha256_file(tmp_path / "vae.safetensors")
    assert pretrain("transformer", tmp_path, "evaluation.guidance=1.0", "seed=5") == 0
    assert sha256_file(tmp_path / "vae.safetensors") == coder
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["autoencoder"]["training"]["steps"] == 2
    assert report["transformer"]["drawn"][0]["guidance"] == 1.0


def test_bench_measures_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "WARM_STEPS", 0)
    monkeypatch.setattr(trainer, "TIMED_STEPS", 1)
    assert pretrain("bench", tmp_path / "out") == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "ms a step" in line]
    assert len(lines) == 6
    assert sum("compiled" in line for line in lines) == 2
    assert not (tmp_path / "out").exists()


def test_wrong_recipe_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain("all", tmp_path, "autoencoder.stpes=3") == 2
    assert "did you mean autoencoder.steps?" in capfd.readouterr().err
    assert pretrain("all", tmp_path, "autoencoder.pools=[{ height = 33 }]") == 2
