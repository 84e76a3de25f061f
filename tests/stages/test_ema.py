"""The moving average: saved beside the LoRA, proved and restored like it, and drawn when asked for."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from stages.stores.tensors import load, tensor_digest
from tests.stages.project import Project, flip

EMA = ("train.ema.decay=0.5", "train.ema.warmup=false", "preview.during_training=false")
DRAWN = (*EMA[:2], "preview.ema=true")


@pytest.fixture(scope="module")
def averaged(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A training that kept an average; only to be looked at or copied."""
    project = encoded.copy(tmp_path_factory.mktemp("averaged") / "project")
    project.make("train", sets=EMA)
    return project


def test_average_is_saved_beside_the_lora_and_at_every_checkpoint(averaged: Project) -> None:
    average, lora = load(averaged.results / "cat_ema.safetensors"), load(averaged.lora)
    assert average.tensors.keys() == lora.tensors.keys()
    assert tensor_digest(average.tensors) != tensor_digest(lora.tensors)
    folders = sorted((averaged.store / "checkpoints").glob("*/*"))
    assert [folder.name for folder in folders if (folder / "ema.safetensors").is_file()] == ["2", "4"]
    assert (folders[-1] / "ema.safetensors").read_bytes() == (averaged.results / "cat_ema.safetensors").read_bytes()


def test_average_is_that_of_the_saved_state(averaged: Project) -> None:
    [folder] = (averaged.store / "checkpoints").glob("*/4")
    state = load(folder / "state.safetensors").tensors
    name = "single_blocks.0.linear1.lora_A"
    bits = load(folder / "ema.safetensors").tensors[f"diffusion_model.{name}.weight"].data.astype(np.uint32)
    rounded = (bits << 16).view(np.float32)
    np.testing.assert_allclose(rounded, state[f"ema.{name}"].data, rtol=2**-8)


def test_average_changes_no_bit_of_the_lora(averaged: Project, finished: Project) -> None:
    assert tensor_digest(load(averaged.lora).tensors) == tensor_digest(load(finished.lora).tensors)


def test_lost_average_is_restored_and_a_changed_one_found(averaged: Project, tmp_path) -> None:
    project = averaged.copy(tmp_path / "project")
    path = project.results / "cat_ema.safetensors"
    before = path.read_bytes()
    path.unlink()
    assert project.run("train", sets=EMA).status == "up to date"
    assert path.read_bytes() == before
    project.make("preview", sets=EMA)
    assert project.run("verify", sets=EMA).code == 0
    flip(path)
    ran = project.run("verify", sets=EMA)
    assert ran.code == 4
    assert ran.result["findings"][0]["where"] == str(path)


def test_previews_of_the_average_are_other_pictures(averaged: Project, finished: Project, tmp_path) -> None:
    project = averaged.copy(tmp_path / "project")
    ran = project.make("preview", sets=DRAWN)["preview"]
    assert ran.counts == {"images": 3, "rendered": 3, "reused": 0}
    assert project.run("verify", sets=DRAWN).code == 0
    folders = (project.results, finished.results)
    shown, plain = ([(folder / f"preview_{step}.png").read_bytes() for step in (0, 2, 4)] for folder in folders)
    # Without a LoRA there is nothing to average.
    assert shown[0] == plain[0]
    assert shown[1] != plain[1]
    assert shown[2] != plain[2]


def test_training_draws_the_average_as_the_preview_stage_does(untrained: Project) -> None:
    untrained.make("train", sets=DRAWN)
    assert untrained.make("preview", sets=DRAWN)["preview"].counts == {"images": 3, "rendered": 0, "reused": 3}


def test_average_that_is_off_cannot_be_drawn(untrained: Project) -> None:
    refused = untrained.run("preview", sets=("preview.ema=true",))
    assert (refused.code, refused.error) == (2, "config.wrong_value")
    assert "[train.ema]" in msgspec.json.encode(refused.result).decode() + refused.stderr
