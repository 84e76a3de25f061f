"""FLUX.2 dev from pictures to a verified LoRA, with a model of its shape that diffusers and transformers saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from stages.flux2.transformer import Transformer
from stages.stores.tensors import load
from tests.golden.tiny import GOLDEN
from tests.stages.project import MAKING, Project, edit, new_project, rows

PARTS = ("transformer", "vae", "text_encoder", "tokenizer")


def make_model(folder: Path) -> None:
    """Put a whole FLUX.2 dev of tiny parts into `folder`, as diffusers saves one."""
    for part in PARTS:
        shutil.copytree(GOLDEN / "tiny-dev" / part, folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline"}))


def fed(patch: pytest.MonkeyPatch) -> list[float]:
    """Return the guidance that every forward pass of a transformer is fed from now on."""
    heard: list[float] = []
    forward = Transformer.__call__

    def listening(model: Transformer, *inputs: mx.array) -> mx.array:
        heard.extend(np.array(inputs[3]).tolist())
        return forward(model, *inputs)

    patch.setattr(Transformer, "__call__", listening)
    return heard


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of dev through all stages that make something; only to be looked at."""
    project = new_project(tmp_path_factory.mktemp("dev") / "project")
    edit(project.config, "[validate]", '[model]\nsource = "model"\n\n[validate]')
    make_model(project.root / "model")
    project.make()
    return project


def test_all_six_stages_run_and_the_chain_is_whole(dev: Project) -> None:
    assert dev.run("verify").code == 0
    assert {stage: dev.run(stage).status for stage in MAKING} == dict.fromkeys(MAKING, "up to date")
    assert (dev.results / "preview_4.png").is_file()
    changed = [factor for name, factor in load(dev.lora).tensors.items() if "lora_B" in name]
    assert changed
    assert all(np.any(factor.data) for factor in changed)


def test_training_is_at_guidance_one_and_previews_at_four(dev: Project, tmp_path: Path) -> None:
    project = dev.copy(tmp_path / "project")
    with pytest.MonkeyPatch.context() as patch:
        heard = fed(patch)
        project.make("train", sets=("run.seed=8", "preview.during_training=false", "train.compile=false"))
        assert set(heard) == {1.0}
        heard.clear()
        project.make("preview", sets=("preview.seed=8",))
    # One pass a step: guidance is embedded, no empty prompt is drawn besides.
    assert heard == [4.0] * len(heard)
    assert len(heard) == 3 * 2


def test_lora_says_at_which_guidance_it_was_trained(dev: Project, finished: Project) -> None:
    assert load(dev.lora).metadata["training_guidance"] == "1.0"
    assert "training_guidance" not in load(finished.lora).metadata


def test_embeddings_have_512_rows_and_say_how_many_are_no_pads(dev: Project) -> None:
    index = rows(dev.run("encode-text").folder / "index.parquet")
    assert {(row["length"], row["width"]) for row in index} == {(512, 24)}
    for row in index:
        data = rows(dev.store / row["fragment"])[row["row"]]["data"]
        embedding = np.frombuffer(data, np.uint16).reshape(row["length"], row["width"])
        pads = row["length"] - row["tokens"]
        assert (embedding[:pads] == embedding[0]).all()
        assert (embedding[pads] != embedding[0]).any()


def test_repeated_rows_take_no_room(dev: Project) -> None:
    index = rows(dev.run("encode-text").folder / "index.parquet")
    stored = sum((dev.store / fragment).stat().st_size for fragment in {row["fragment"] for row in index})
    tokens, whole = (sum(row[column] * row["width"] * 2 for row in index) for column in ("tokens", "length"))
    assert stored < tokens + 8192 < whole / 2
