"""The loss on held-out pictures: which they are, when it is measured, and that it leaves no trace in the LoRA."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from stages.stores.tensors import load, tensor_digest
from tests.stages.project import COLORS, Project, draw

# Curves are drawn once, not at every checkpoint: they take longer than these few steps.
QUIET = ("preview.during_training=false", "train.checkpoint_every=100", "train.steps=3")
ON = ("train.validation.every=2", "train.validation.pictures=1", *QUIET)


def losses(project: Project) -> dict[int, float]:
    lines = [msgspec.json.decode(line) for line in (project.results / "metrics.jsonl").read_bytes().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def digest(project: Project) -> str:
    return tensor_digest(load(project.lora).tensors)


@pytest.fixture(scope="module")
def validated(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A training that measured itself; only to be looked at or copied."""
    project = encoded.copy(tmp_path_factory.mktemp("validated") / "project")
    project.make("train", sets=ON)
    return project


def test_loss_is_measured_at_the_start_and_every_n_steps(validated: Project) -> None:
    found = losses(validated)
    assert list(found) == [0, 2]
    assert found[0] != found[2]


def test_how_often_and_where_it_is_measured_changes_no_bit(untrained: Project, validated: Project) -> None:
    untrained.make("train", sets=(*ON, "train.validation.every=1"))
    assert digest(untrained) == digest(validated)
    often = losses(untrained)
    assert list(often) == [0, 1, 2, 3]
    assert {step: often[step] for step in (0, 2)} == losses(validated)
    # Nothing of it is keyed either.
    assert untrained.run("train", sets=(*ON, "train.validation.sigmas=[0.5]")).status == "up to date"


def test_loss_is_the_mean_over_the_noise_levels_of_the_settings(untrained: Project) -> None:
    found = []
    for sigmas in ("[0.2]", "[0.8]", "[0.2, 0.8]"):
        sets = (*ON, "train.steps=1", f"train.validation.sigmas={sigmas}")
        assert untrained.run("train", "--force", sets=sets).code == 0
        found.append(losses(untrained)[0])
    assert found[0] != found[1]
    # Each is a mean in float32.
    assert found[2] == pytest.approx((found[0] + found[1]) / 2, rel=2e-7)


def test_resumed_training_measures_the_same(untrained: Project, validated: Project) -> None:
    untrained.make("train", sets=(*ON, "train.steps=2"))
    untrained.make("train", sets=ON)
    assert losses(untrained) == losses(validated)
    assert digest(untrained) == digest(validated)


def test_held_out_picture_is_not_trained_on(untrained: Project) -> None:
    project = untrained
    # Held out by its name; what it looks like then moves no bit of the LoRA, what is left out moves all.
    [one, other] = list(COLORS)[:2]
    sets = [(*ON, f'train.validation.names=["{name}.png"]') for name in (one, other)]
    digests = []
    for each in sets:
        project.make("train", sets=each)
        digests.append(digest(project))
    assert digests[0] != digests[1]
    (project.pictures / f"{one}.txt").write_text("another caption entirely")
    project.make("validate", "encode-latents", "encode-text", "train", sets=sets[0])
    assert digest(project) == digests[0]


def test_choice_follows_the_pictures_not_their_names(untrained: Project) -> None:
    untrained.make("train", sets=ON)
    for path in sorted(untrained.pictures.iterdir()):
        path.rename(path.with_name(f"x-{path.name}"))
    ran = untrained.make("validate", "encode-latents", "encode-text", "train", sets=ON)
    assert ran["train"].status == "up to date"


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ('train.validation.names=["ada.jpg", "dot.png", "zed.png"]', "validation.unknown_picture"),
        ("train.validation.pictures=4", "validation.nothing_left"),
    ],
)
def test_choice_that_cannot_be_is_refused_before_training(untrained: Project, setting: str, code: str) -> None:
    refused = untrained.run("train", sets=(*ON, setting))
    assert (refused.code, refused.error) == (2, code)
    if code == "validation.unknown_picture":
        assert "did you mean ada.png?" in refused.stderr
        assert refused.stderr.count("error[") == 2


def test_pictures_of_the_class_are_never_held_out(untrained: Project) -> None:
    draw(untrained.root / "class", "someone", (9, 9, 9), "a person")
    sets = (*ON, 'validate.class_dataset="class"', 'train.preservation.kind="prior"')
    untrained.make("validate", "encode-latents", "encode-text", sets=sets)
    # A picture of the class is left, but none of the subject.
    refused = untrained.run("train", sets=(*sets, "train.validation.pictures=4"))
    assert (refused.code, refused.error) == (2, "validation.nothing_left")
    assert untrained.run("train", sets=(*sets, "train.validation.pictures=3")).code == 0


def test_collapsing_training_is_warned_of_and_ends_with_exit_8_and_whole_checkpoints(untrained: Project) -> None:
    # Steps of this rate ruin a model; a checkpoint a step, so that a second run goes on from the last.
    sets = (*ON, "train.validation.every=1", "train.learning_rate=0.5", "train.checkpoint_every=1", "train.steps=9")
    strict = (*sets, "train.validation.collapse_factor=1.02", "train.validation.collapse_patience=2")
    ended = untrained.run("train", sets=strict)
    assert (ended.code, ended.error) == (8, "train.collapsed")
    found = losses(untrained)
    *before, first, last = found.values()
    assert min(first, last) > 1.02 * min(before)
    assert f"above 1.02 times its best after step {max(found) - 1}: loss" in ended.stderr
    again = untrained.run("train", sets=strict)
    assert (again.code, again.error) == (8, "train.collapsed")
    assert losses(untrained) == found
    # What a collapse is, is in no key: the same training goes on, from the checkpoint before the last step.
    patient = (*sets, "train.validation.collapse_factor=1000")
    assert untrained.run("train", sets=patient).counts == {"steps": 9, "resumed_from": max(found) - 1}
    assert untrained.run("train", sets=strict).status == "up to date"


def test_first_lines_say_what_a_model_that_answers_nothing_would_cost(untrained: Project) -> None:
    untrained.make("train", sets=(*QUIET, "train.steps=12"))
    lines = [msgspec.json.decode(line) for line in (untrained.results / "metrics.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines if "silent_loss" in line] == list(range(1, 11))


def test_held_out_run_is_whole(validated: Project, tmp_path: Path) -> None:
    project = validated.copy(tmp_path / "project")
    project.make("preview", sets=ON)
    assert project.run("verify", sets=ON).code == 0
    assert project.run("train", sets=ON).status == "up to date"
