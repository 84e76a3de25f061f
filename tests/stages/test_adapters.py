"""[train.adapter] and train.init_lora through the stages: what is saved, keyed, warned of and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.stores.tensors import Tensor, load, save
from tests.stages.project import Project

QUICK = ("preview.during_training=false", "train.steps=2")
START = "train.init_lora=start.safetensors"
KINDS = {
    "dora": ('train.adapter={kind="dora"}', {".lora_A.weight", ".lora_B.weight", ".dora_scale"}),
    "lokr": ('train.adapter={kind="lokr", factor=4}', {".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"}),
    "pissa": ('train.adapter={kind="lora", init="pissa"}', {".lora_A.weight", ".lora_B.weight"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_drawn_and_verified(untrained: Project, kind: str) -> None:
    setting, endings = KINDS[kind]
    sets = (setting, "train.steps=1")
    made = untrained.make("train", "preview", "verify", sets=sets)
    file = load(untrained.lora)
    assert {ending for name in file.tensors for ending in endings if name.endswith(ending)} == endings
    assert all(name.endswith(tuple(endings)) for name in file.tensors)
    assert file.metadata["lora_rank"] == ("8" if kind == "pissa" else "4")
    assert made["preview"].counts["rendered"] == 0  # training drew the very pictures
    assert (untrained.results / "preview_1.png").read_bytes() != (untrained.results / "preview_0.png").read_bytes()


def test_programs_that_would_misread_the_lora_are_named_before_training(untrained: Project) -> None:
    ran = untrained.run("train", sets=("train.rank=6", *QUICK))
    assert ran.code == 0
    assert "rank 6 is divisible by 3" in ran.stderr


@pytest.fixture(scope="module")
def continued(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run that went on from the finished run's LoRA; only to be copied."""
    project = finished.copy(tmp_path_factory.mktemp("continued") / "project")
    shutil.copy(project.lora, project.root / "start.safetensors")
    project.make("train", sets=(START, *QUICK))
    return project


@pytest.fixture
def going_on(continued: Project, tmp_path: Path) -> Project:
    return continued.copy(tmp_path / "project")


def test_training_goes_on_from_a_file_whatever_it_is_called(going_on: Project, finished: Project) -> None:
    start, went_on = load(finished.lora).tensors, load(going_on.lora).tensors
    distance = max(np.abs(floats(start[name]) - floats(went_on[name])).max() for name in start)
    assert 0 < distance < 0.01  # two steps of at most 1e-3 each
    again = going_on.run("train", sets=(START, *QUICK))
    assert again.status == "up to date"
    (going_on.root / "start.safetensors").rename(going_on.root / "moved.safetensors")
    moved = going_on.run("train", sets=("train.init_lora=moved.safetensors", *QUICK))
    assert (moved.status, moved.result["key"]) == ("up to date", again.result["key"])


def floats(tensor: Tensor) -> np.ndarray:
    return (tensor.data.astype(np.uint32) << 16).view(np.float32)


def test_a_start_that_changed_is_another_training(going_on: Project) -> None:
    path = going_on.root / "start.safetensors"
    file = load(path)
    name = min(file.tensors)
    file.tensors[name] = Tensor("BF16", file.tensors[name].data ^ 1)
    path.unlink()
    save(path, file.tensors, file.metadata)
    ran = going_on.run("train", sets=(START, *QUICK))
    assert (ran.code, ran.status) == (0, "built")
    assert "init_lora:" in ran.stderr


@pytest.mark.parametrize(
    ("name", "sets", "code", "error"),
    [
        ("start.safetensors", ("train.rank=8",), 2, "train.init_lora_rank"),
        ("start.safetensors", ("train.targets=attention",), 2, "train.init_lora_targets"),
        ("start.safetensors", ('train.adapter={kind="dora"}',), 2, "train.init_lora_kind"),
        ("absent.safetensors", (), 2, "train.init_lora_absent"),
        ("cut.safetensors", (), 4, "tensors.truncated"),
        ("start.safetensors", ('train.exclude=["double_blocks.7.*"]',), 2, "train.no_such_target"),
        ("start.safetensors", ('train.adapter={kind="lora", init="pissa"}',), 2, "config.wrong_value"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    going_on: Project, name: str, sets: tuple[str, ...], code: int, error: str
) -> None:
    whole = (going_on.root / "start.safetensors").read_bytes()
    (going_on.root / "cut.safetensors").write_bytes(whole[:-1])
    ran = going_on.run("train", sets=(f"train.init_lora={name}", *QUICK, *sets))
    assert (ran.code, ran.error) == (code, error)
