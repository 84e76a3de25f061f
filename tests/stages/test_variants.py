"""Caption variants, repeats and sizes by step through all stages: what is encoded again, and what training draws."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from schemas.tables import CAPTIONS, DATASET
from stages.stores.tables import read_table
from stages.stores.tensors import load, tensor_digest
from stages.training.data import Sample, TrainingData
from tests.stages.project import MAKING, Project

QUIET = "preview.during_training=false"
ENCODING = MAKING[:3]


def losses(project: Project) -> list[float]:
    lines = (project.results / "metrics.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line)["loss"] for line in lines]


def counted(project: Project, *sets: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Run up to the encoders; return (encoded, reused) of latents and of text."""
    ran = project.make(*ENCODING, sets=sets)
    latents, text = ran["encode-latents"].counts, ran["encode-text"].counts
    return (latents["encoded"], latents["reused"]), (text["encoded"], text["reused"])


def read_samples(project: Project, patch: pytest.MonkeyPatch, *sets: str) -> list[Sample]:
    """Train and return what was read, in order."""
    found: list[Sample] = []
    read = TrainingData.read

    def recorded(data: TrainingData, samples: list[Sample], *, classes: bool = False) -> object:
        found.extend(samples)
        return read(data, samples, classes=classes)

    with patch.context() as patched:
        patched.setattr(TrainingData, "read", recorded)
        project.make("train", sets=(QUIET, *sets))
    return found


def test_another_line_is_the_only_thing_encoded(untrained: Project) -> None:
    lines = 'validate.captions="lines"'
    # The setting alone changes no caption: the same texts, the same latents.
    assert counted(untrained, lines) == ((0, 4), (0, 6))
    (untrained.pictures / "ada.txt").write_text("a [trigger] called ada\nada, a [trigger]\n")
    assert counted(untrained, lines) == ((0, 4), (1, 6))
    folder = untrained.run("validate", sets=(lines,)).folder
    assert len(read_table(folder / "dataset.parquet", DATASET)) == 5
    assert untrained.run("validate", sets=(lines,)).counts["items"] == 5


def test_one_variant_is_drawn_per_visit_and_epochs_stay_as_long(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'validate.captions="lines"'
    (untrained.pictures / "ada.txt").write_text("a [trigger] called ada\nada, a [trigger]\n")
    untrained.make(*ENCODING, sets=(lines,))
    samples = read_samples(untrained, monkeypatch, lines, "train.steps=20")
    visits = [sample.visit for sample in samples]
    # Batches of two: an epoch of four pictures is two steps.
    assert all(sorted(visits[start : start + 4]) == sorted(set(visits)) for start in range(0, 40, 4))
    assert len(set(visits)) == 4
    picks = [sample.caption < 0.5 for sample in samples]
    assert 10 <= sum(picks) <= 30


def test_tag_variants_are_a_fixed_number_of_cached_texts(untrained: Project) -> None:
    for path in untrained.pictures.glob("*.txt"):
        path.write_text(f"[trigger], red, blue, green, {path.stem}")
    tags = "validate.tags={variants = 3, keep_first = 1}"
    assert counted(untrained, tags) == ((0, 4), (12, 2))
    assert counted(untrained, tags) == ((0, 4), (0, 14))
    # More variants keep those there are; another seed makes others.
    assert counted(untrained, "validate.tags={variants = 4, keep_first = 1}") == ((0, 4), (4, 14))
    folder = untrained.run("validate", sets=(tags,)).folder
    texts = [row["text"] for row in read_table(folder / "captions.parquet", CAPTIONS)]
    assert all(text.startswith("zorb, ") for text in texts)


def test_repeats_encode_nothing_and_lengthen_the_epoch(untrained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    repeats = 'validate.repeats=[{pattern = "ada.*", times = 3}]'
    assert counted(untrained, repeats) == ((0, 4), (0, 6))
    encoders = untrained.make("encode-latents", "encode-text", sets=(repeats,))
    assert {each.status for each in encoders.values()} == {"up to date"}
    samples = read_samples(untrained, monkeypatch, repeats, "train.steps=6")
    visits = [sample.visit for sample in samples]
    # Six visits an epoch, of which three are the same picture's.
    assert all(len(set(visits[start : start + 6])) == 6 for start in range(0, 12, 6))
    assert sum(visit.partition("*")[0] == max(visits, key=len)[:32] for visit in visits) == 6


def test_settings_of_the_dataset_that_say_nothing_change_no_key(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "copy")
    neutral = ('validate.captions="one"', "validate.repeats=[]", "train.resolutions=[]")
    ran = {stage: project.run(stage, sets=neutral) for stage in MAKING}
    assert {stage: each.status for stage, each in ran.items()} == dict.fromkeys(MAKING, "up to date")
    assert not (ran["validate"].folder / "draws.parquet").exists()


def test_scheduled_sizes_resume_without_a_trace(untrained: Project, tmp_path: Path) -> None:
    sizes = "validate.resolutions=[32, 48]"
    schedule = "train.resolutions=[{until = 3, sizes = [32]}, {sizes = [48]}]"
    untrained.make(*ENCODING, sets=(sizes,))
    broken = untrained.copy(tmp_path / "broken")
    untrained.make("train", sets=(sizes, schedule, QUIET, "train.steps=6"))
    broken.make("train", sets=(sizes, schedule, QUIET, "train.steps=4"))
    resumed = broken.make("train", sets=(sizes, schedule, QUIET, "train.steps=6"))["train"]
    assert resumed.counts["resumed_from"] == 4
    assert losses(broken) == losses(untrained)
    digests = [tensor_digest(load(project.lora).tensors) for project in (broken, untrained)]
    assert digests[0] == digests[1]


def test_size_that_validate_does_not_make_is_refused(untrained: Project) -> None:
    refused = untrained.run("train", sets=("train.resolutions=[{sizes = [48]}]",))
    assert (refused.code, refused.error) == (2, "config.wrong_value")
    assert "train.resolutions draws [48], validate.resolutions has [32]" in refused.stderr
