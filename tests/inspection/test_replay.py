"""Steps taken again: a whole training repeats to the bit, and forgeries that no digest shows are found."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from stages.flux2 import backend
from stages.training.step import Trainer
from tests.faults import mutants
from tests.stages.project import Project, Ran, edit, listing, new_project

PLAIN = ("preview.during_training=false",)
ELSEWHERE = "another device"

Forge = Callable[[Project], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run with checkpoints at 2 and 4; only to be looked at or copied."""
    project = new_project(tmp_path_factory.mktemp("replay") / "project")
    project.make()
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    return finished.copy(tmp_path / "project")


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verify compute as a GPU does."""
    prepare = backend.prepare
    other = {"compute_dtype": mx.bfloat16, "chip": "another"}
    monkeypatch.setattr(backend, "prepare", lambda: dataclasses.replace(prepare(), **other))


def report(project: Project) -> dict[str, Any]:
    return msgspec.json.decode((project.results / "verify.json").read_bytes())


def steps(project: Project) -> dict[str, int]:
    """Return how many steps were made again, by outcome."""
    return {name: count for name, count in report(project)["recomputed"].items() if name.startswith("steps")}


def left_out(project: Project) -> str:
    return "; ".join(each for each in report(project)["not_checked"] if "--deep" not in each)


def found(ran: Ran) -> list[str]:
    """Return the codes of what verify found, but that a stage has not run."""
    return sorted({each["code"] for each in ran.result["findings"]} - {"stage.not_run"})


def checkpoint(project: Project, step: int) -> Path:
    return mutants.only(project.store, f"checkpoints/*/{step}")


def test_whole_training_repeats_to_the_bit_and_nothing_is_written_but_the_report(project: Project) -> None:
    before = listing(project.root)
    ran = project.run("verify", "--recompute", "100%")
    after = listing(project.root)
    assert (ran.code, ran.result["findings"], steps(project)) == (0, [], {"steps_equal": 4})
    assert left_out(project) == ""
    assert {name for name in after if after[name] != before.get(name)} == {"runs/cat", "runs/cat/verify.json"}
    assert "4 steps equal" in ran.stderr


def test_share_of_the_steps_is_taken_and_the_rest_named(project: Project) -> None:
    assert project.run("verify", "--recompute", "25%").code == 0
    assert steps(project) == {"steps_equal": 1}
    assert "3 of 4 training steps; whether the steps before come to the weights saved at 2, 4" in left_out(project)


def weights(project: Project) -> None:
    mutants.recheckpointed(checkpoint(project, 2), lambda tensors: mutants.scaled(tensors, "lora.", 1.01))


def moments(project: Project) -> None:
    mutants.recheckpointed(checkpoint(project, 4), lambda tensors: mutants.scaled(tensors, "optimizer.", 1.01))


def counter(project: Project) -> None:
    def of_floats(tensors: dict[str, mutants.Tensor]) -> None:
        tensors["optimizer.step"] = mutants.from_mlx(mx.array(4.0))

    mutants.recheckpointed(checkpoint(project, 4), of_floats)


def loss(project: Project) -> None:
    def forged(lines: list[bytes]) -> list[bytes]:
        return [*lines[:2], re.sub(rb'"loss":([0-9]+\.[0-9]{2})', rb'"loss":\g<1>1', lines[2]), lines[3]]

    mutants.rewritten_history(project, forged)


def finished_lora(project: Project) -> None:
    mutants.relearnt(project, lambda tensors: mutants.scaled(tensors, "lora_B", 1.5))


def earlier_lora(project: Project) -> None:
    mutants.recheckpointed(
        checkpoint(project, 2), lambda tensors: mutants.scaled(tensors, "lora_B", 1.5), "lora.safetensors"
    )
    shutil.copyfile(checkpoint(project, 2) / "lora.safetensors", project.results / "checkpoint_2.safetensors")
    (project.results / "preview.json").unlink()


FORGED: dict[str, tuple[Forge, set[str], str]] = {
    "weights of a checkpoint": (weights, {"train.replayed", "checkpoint.lora"}, "of the state are not those saved"),
    "moments of the optimizer": (moments, {"train.replayed"}, "of the state are not those saved"),
    "counter of the optimizer": (counter, {"checkpoint.state"}, "the checkpoint is not of this training"),
    "a loss": (loss, {"train.replayed"}, "training again from step 2 to 4: step 3 has the loss"),
    "the finished LoRA": (finished_lora, {"checkpoint.lora"}, "the LoRA of step 4 is not what its state makes"),
    "an earlier LoRA": (earlier_lora, {"checkpoint.lora"}, "the LoRA of step 2 is not what its state makes"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_no_digest_shows_is_found_by_taking_the_steps_again(project: Project, name: str) -> None:
    forge, expected, said = FORGED[name]
    forge(project)
    assert found(project.run("verify")) == []
    ran = project.run("verify", "--recompute", "100%")
    assert (ran.code, set(found(ran))) == (4, expected)
    assert said in "; ".join(each["what"] for each in ran.result["findings"])


def test_forged_weights_are_found_from_either_side(project: Project) -> None:
    """The steps before do not come to them, those after do not come from them."""
    weights(project)
    ran = project.run("verify", "--recompute", "100%")
    whats = sorted(each["what"] for each in ran.result["findings"] if each["code"] == "train.replayed")
    spans = ["training again from step 0 to 2", "training again from step 2 to 4"]
    assert [what.partition(":")[0] for what in whats] == spans
    assert "step 3 has the loss" in whats[1]
    assert steps(project) == {"steps_other": 4}


def test_another_backend_comes_near_and_is_no_fault(project: Project, in_bfloat16: None) -> None:
    ran = project.run("verify", "--recompute", "100%")
    assert (ran.code, ran.result["findings"], steps(project)) == (0, [], {"steps_close": 4})


def test_another_backend_finds_other_weights(project: Project, in_bfloat16: None) -> None:
    mutants.recheckpointed(checkpoint(project, 2), lambda tensors: mutants.scaled(tensors, "lora_B", -1.0))
    ran = project.run("verify", "--recompute", "100%")
    assert (ran.code, found(ran)) == (4, ["checkpoint.lora", "train.replayed"])
    # Moments below zero: from there nothing finite comes.
    whats = {each["what"] for each in ran.result["findings"]}
    assert "training again from step 2 to 4: the training state is no longer finite; it is not saved" in whats
    assert steps(project) == {"steps_other": 4}


def test_bits_count_only_where_the_same_device_computed_all_of_it(project: Project) -> None:
    def slightly(tensors: dict[str, mutants.Tensor]) -> None:
        mutants.scaled(tensors, "lora_B", 1.001)

    for computed_on in ((), (ELSEWHERE,), (ELSEWHERE, backend.prepare().name)):
        mutants.recheckpointed(checkpoint(project, 4), slightly, computed_on=computed_on)
        assert project.run("verify", "--recompute", "100%").result["findings"] == []
        assert steps(project) == {"steps_equal": 2, "steps_close": 2}
    mutants.recheckpointed(checkpoint(project, 4), slightly, computed_on=(backend.prepare().name,))
    assert found(project.run("verify", "--recompute", "100%")) == ["checkpoint.lora", "train.replayed"]


def test_checkpoints_name_every_device_so_far(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    here = backend.prepare().name
    mutants.recheckpointed(checkpoint(project, 4), lambda _: None, computed_on=(ELSEWHERE,))
    project.make("train", sets=("train.steps=6", *PLAIN))
    assert msgspec.json.decode((checkpoint(project, 6) / "manifest.json").read_bytes())["computed_on"] == [
        ELSEWHERE,
        here,
    ]
    device = mutants.manifest_of(max((project.store / "train").iterdir(), key=lambda each: each.stat().st_mtime))
    assert device.provenance["device"] == f"{ELSEWHERE}; {here}"


def test_step_that_found_no_memory_is_not_taken_again(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, launch = finished.copy(tmp_path / "project"), Trainer._launch

    def failing(trainer: Trainer, arrays: list[mx.array]) -> None:
        if trainer.steps == 2:
            raise RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes.")
        launch(trainer, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_launch", failing)
        project.make("train", sets=("run.seed=8", "train.checkpoint_every=4", *PLAIN))
    ran = project.run("verify", "--recompute", "100%", sets=("run.seed=8",))
    hints = ["train.copies_of_others"]  # of the training before, which the fixture ran
    assert (found(ran), steps(project)) == (["chain.broken", *hints], {"steps_equal": 2})
    assert "2 of 4 training steps" in left_out(project)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("train.validation.pictures=1",), "its held out changed since"),
        (("train.init_lora='other.safetensors'",), "the LoRA to train on from does not exist"),
    ],
)
def test_input_that_is_not_there_any_more_is_said(project: Project, sets: tuple[str, ...], said: str) -> None:
    ran = project.run("verify", "--recompute", "100%", sets=sets)
    assert (ran.code, steps(project)) == (0, {})
    assert f"training steps made again: {said}" in left_out(project)


def test_training_without_checkpoints_is_not_taken_again(project: Project) -> None:
    shutil.rmtree(project.store / "checkpoints")
    (project.results / "preview.json").unlink()
    project.run("verify", "--recompute", "100%")
    assert "there are no metrics or no checkpoints to compare with" in left_out(project)


def test_training_on_other_records_is_not_taken_again(project: Project) -> None:
    edit(project.pictures / "ada.txt", "called ada", "called eve")
    project.make("validate", "encode-text")
    assert project.run("verify", "--recompute", "100%").code == 5
    assert "training steps made again: it was made of other records than there are" in left_out(project)


def test_held_out_pictures_and_changed_settings_do_not_matter(project: Project) -> None:
    """The steps are those of the training that was, whatever the pipeline's file says by now."""
    sets = ("train.validation.pictures=1", "train.validation.every=2", *PLAIN)
    project.make("train", "preview", sets=sets)
    ran = project.run("verify", "--recompute", "100%", sets=(*sets, "train.rank=8", "run.seed=9"))
    assert (ran.result["findings"], steps(project)) == ([], {"steps_equal": 4})


def test_stop_while_steps_are_taken_again_ends_verify(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def stopped(trainer: Trainer, *batches: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return step(trainer, *batches, **more)

    monkeypatch.setattr(Trainer, "step", stopped)
    before = listing(project.root)
    ran = project.run("verify", "--recompute", "100%")
    assert (ran.code, ran.error) == (143, "run.stopped")
    assert "verify keeps nothing" in ran.stderr
    assert listing(project.root) == before
