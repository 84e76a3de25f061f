"""control, rotation and what is checked before the model is loaded, on the whole program."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from schemas.run import Config
from stages.flux2 import load
from stages.stores.tensors import load as load_tensors
from stages.stores.tensors import tensor_digest
from stages.training import memory
from tests.stages.project import Project, edit

STEPS = 6


def control(project: Project, action: str, run: str = "cat") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages", "control", run, action, "--runs", str(project.root / "runs"), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def digest(project: Project) -> str:
    return tensor_digest(load_tensors(project.lora).tensors)


def steps_saved(project: Project) -> list[int]:
    return sorted(int(path.name) for path in (project.store / "checkpoints").glob("*/*"))


def copies(project: Project) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in project.results.glob("checkpoint_*.safetensors"))


@pytest.fixture(scope="module")
def ready(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Everything that training reads; only to be copied."""
    project = encoded.copy(tmp_path_factory.mktemp("ready") / "project")
    edit(project.config, 'prompts = ["a red [trigger]"]', "prompts = []")
    edit(project.config, "steps = 4\n", f"steps = {STEPS}\n")
    project.make("encode-text")
    return project


@pytest.fixture(scope="module")
def straight(ready: Project, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the LoRA of a training that nobody disturbed."""
    project = ready.copy(tmp_path_factory.mktemp("straight") / "project")
    project.make("train")
    return digest(project)


@pytest.fixture
def untrained(ready: Project, tmp_path: Path) -> Project:
    return ready.copy(tmp_path / "project")


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when anything loads the transformer."""

    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(load, "load_transformer", refuse)


def test_training_in_another_process_pauses_goes_on_and_stops(untrained: Project, straight: str) -> None:
    command = [sys.executable, "-m", "stages", *untrained.arguments("train", "--set", "train.steps=3000")]
    environment = {**os.environ, "FLUX2_LORA_EVENTS": "1"}
    metrics = untrained.results / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if msgspec.json.decode(line).get("done", 0) >= 1:
                break
        paused = control(untrained, "pause")
        before = metrics.stat().st_size
        assert paused.returncode == 0, paused.stderr
        step = msgspec.json.decode(paused.stdout)["counts"]["steps"]
        assert f"paused after step {step}" in paused.stderr
        assert len(metrics.read_bytes().splitlines()) == step
        # A step takes a few hundredths of a second.
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            assert metrics.stat().st_size == before
        saved = control(untrained, "checkpoint")
        assert msgspec.json.decode(saved.stdout)["counts"]["steps"] == step
        assert step in steps_saved(untrained)
        assert control(untrained, "resume").returncode == 0
        stopped = control(untrained, "stop")
        assert stopped.returncode == 0, stopped.stderr
        said = process.stderr.read().decode()
    assert process.returncode == 143
    assert f"control: paused after step {step}" in said
    assert "error[run.stopped]" in said
    assert steps_saved(untrained)[-1] == msgspec.json.decode(stopped.stdout)["counts"]["steps"] > step
    assert [path for path in untrained.results.iterdir() if "control" in path.name] == []
    untrained.make("train")
    assert digest(untrained) == straight


def test_run_that_is_not_there_or_not_training_is_named(untrained: Project) -> None:
    unknown = control(untrained, "pause", run="cta")
    assert unknown.returncode == 2
    assert "error[run.unknown] there is no run cta" in unknown.stderr
    assert "fix: did you mean cat?" in unknown.stderr
    idle = control(untrained, "pause")
    assert idle.returncode == 2
    assert "error[control.nobody] no training is under way in this run" in idle.stderr
    assert msgspec.json.decode(idle.stdout)["error"]["code"] == "control.nobody"


def test_rotation_keeps_what_it_should_and_changes_nothing(untrained: Project, straight: str) -> None:
    every = "train.checkpoint_every=1"
    rotation = "train.rotation={keep_last = 2, pin = [1], keep_best = false}"
    untrained.make("train", sets=("train.steps=3", every, rotation))
    assert steps_saved(untrained) == copies(untrained) == [1, 2, 3]
    ran = untrained.make("train", "preview", sets=(every, rotation))["train"]
    assert ran.counts == {"steps": STEPS, "resumed_from": 3}
    assert steps_saved(untrained) == copies(untrained) == [1, STEPS - 1, STEPS]
    assert digest(untrained) == straight
    # Neither the key nor what there is to do depends on it.
    again = untrained.run("train", sets=(every,))
    assert (again.status, again.result["key"]) == ("up to date", ran.result["key"])
    assert copies(untrained) == [1, STEPS - 1, STEPS]
    assert untrained.run("verify", sets=(every,)).code == 0


@pytest.mark.usefixtures("never_loaded")
def test_checkpoints_that_cannot_fit_are_refused_before_the_model_is_loaded(untrained: Project) -> None:
    refused = untrained.run("train", sets=("train.steps=10000000", "train.checkpoint_every=1"))
    assert (refused.code, refused.error) == (7, "disk.full")
    assert refused.result["error"]["what"].startswith("need about ")
    assert refused.result["error"]["what"].endswith(" MB free")
    assert steps_saved(untrained) == []


@pytest.mark.usefixtures("never_loaded")
def test_step_that_cannot_fit_is_refused_before_the_model_is_loaded(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = untrained.root / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr(memory, "CGROUP", limit)
    refused = untrained.run("train")
    assert (refused.code, refused.error) == (7, "memory.too_little")
    assert "there are 0.0 GB" in refused.result["error"]["where"]
    assert refused.result["error"]["fix"].startswith("take a smaller model")


@pytest.mark.usefixtures("never_loaded")
def test_run_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(untrained: Project) -> None:
    results = untrained.results
    results.rename(untrained.root / "elsewhere")
    results.write_text("")
    refused = untrained.run("train")
    assert (refused.code, refused.error) == (7, "disk.in_the_way")


def test_rotation_is_a_table_of_the_configuration() -> None:
    rotation = msgspec.convert(
        {"validate": {"dataset": "."}, "train": {"rotation": {"keep_last": 3, "pin": [5]}}}, Config
    ).train.rotation
    assert rotation is not None
    assert (rotation.keep_last, rotation.pin, rotation.keep_best) == (3, (5,), True)
