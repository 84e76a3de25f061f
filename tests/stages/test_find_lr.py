"""find-lr: a rate that trains, and nothing left behind but the chart."""

from __future__ import annotations

import pytest
from PIL import Image

from stages.stores.tensors import load, tensor_digest
from tests.stages.project import Project, Ran, listing

SHORT = ("--steps", "14", "--lowest", "1e-5", "--highest", "1")


def sweep(project: Project, *more: str, sets: tuple[str, ...] = ()) -> Ran:
    return project.run("find-lr", "--output", str(project.root / "chart.png"), *more, sets=sets)


def test_it_suggests_a_rate_and_leaves_only_the_chart(untrained: Project) -> None:
    before = listing(untrained.store, "lookup"), listing(untrained.root / "runs")
    ran = sweep(untrained, *SHORT)
    assert (ran.code, ran.status) == (0, "built")
    assert (listing(untrained.store, "lookup"), listing(untrained.root / "runs")) == before
    found = ran.result["learning_rate"]
    assert 1e-5 < found < 1
    assert f"--set train.learning_rate={found:g}" in ran.stderr
    assert ran.result["path"] == str(untrained.root / "chart.png")
    with Image.open(untrained.root / "chart.png") as chart:
        assert chart.size == (880, 550)


def test_it_stops_where_the_loss_explodes(untrained: Project) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.training.sweep.EXPLODED", 1.1)
        ran = sweep(untrained, "--steps", "60", "--lowest", "1e-3", "--highest", "1", sets=("train.alpha=256",))
    assert ran.counts["steps"] < 20


def test_it_changes_nothing_of_the_training_after_it(untrained: Project, finished: Project) -> None:
    sweep(untrained, *SHORT)
    untrained.make("train", sets=("preview.during_training=false",))
    assert tensor_digest(load(untrained.lora).tensors) == tensor_digest(load(finished.lora).tensors)


def test_it_measures_on_held_out_pictures_where_there_are_some(untrained: Project) -> None:
    assert sweep(untrained, *SHORT, sets=("train.validation.pictures=4",)).error == "validation.nothing_left"
    charts = []
    for setting in ("train.validation.sigmas=[0.5]", "train.validation.sigmas=[0.9]"):
        assert sweep(untrained, *SHORT, sets=(setting,)).code == 0
        charts.append((untrained.root / "chart.png").read_bytes())
    assert charts[0] != charts[1]


@pytest.mark.parametrize(
    ("arguments", "sets", "code"),
    [
        (("--lowest", "1e-2", "--highest", "1e-3"), (), "find_lr.range"),
        ((), ("train.optimizer.kind=prodigy",), "find_lr.prodigy"),
        (("--steps", "10", "--lowest", "1e-12", "--highest", "1e-11"), (), "find_lr.nothing_learnt"),
    ],
)
def test_sweeps_that_can_say_nothing_are_refused(
    untrained: Project, arguments: tuple[str, ...], sets: tuple[str, ...], code: str
) -> None:
    refused = sweep(untrained, *arguments, sets=sets)
    assert refused.code in (2, 8)
    assert refused.error == code
    assert not (untrained.root / "chart.png").exists()


def test_it_needs_the_encoders(untrained: Project) -> None:
    (untrained.results / "encode-latents.json").unlink()
    for folder in (untrained.store / "encode-latents").iterdir():
        (folder / "manifest.json").unlink()
    refused = sweep(untrained, *SHORT)
    assert (refused.code, refused.error) == (5, "input.missing")
