"""[train.preservation]: class captions through encode-text, and what holding the class does to training."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from schemas.tables import EMBEDDING_INDEX
from stages.dataset.captions import caption_id
from stages.pages.curves import panels
from stages.stores.tables import read_table
from stages.stores.tensors import load, tensor_digest
from tests.stages.project import COLORS, Project

PRESERVED = ('train.preservation={kind = "output", class_word = "cat"}',)
PLAIN = ("preview.during_training=false",)
STAGES = ("encode-text", "train")


@pytest.fixture(scope="module")
def preserving(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    """A run trained with its class preserved, and the folder of its embeddings."""
    project = encoded.copy(tmp_path_factory.mktemp("preserving") / "project")
    ran = project.make(*STAGES, sets=PRESERVED + PLAIN)
    assert ran["encode-text"].counts["encoded"] == len(COLORS)
    return project, ran["encode-text"].folder


@pytest.fixture(scope="module")
def plain(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same run without preservation."""
    project = encoded.copy(tmp_path_factory.mktemp("plain") / "project")
    project.make("train", sets=PLAIN)
    return project


def lines_of(project: Project) -> list[dict[str, float]]:
    return [msgspec.json.decode(line) for line in (project.results / "metrics.jsonl").read_bytes().splitlines()]


def losses(project: Project) -> list[float]:
    return [line["loss"] for line in lines_of(project)]


def test_every_caption_has_a_class_caption_under_its_id(preserving: tuple[Project, Path]) -> None:
    rows = read_table(preserving[1] / "index.parquet", EMBEDDING_INDEX)
    classes = {row["caption_id"]: row["text"] for row in rows if row["role"] == "class"}
    assert classes == {caption_id(f"a zorb called {name}"): f"a cat called {name}" for name in COLORS}


def test_training_is_another_from_the_second_step_on(preserving: tuple[Project, Path], plain: Project) -> None:
    """At the first step the adapters change nothing yet: there is nothing to hold."""
    held, free = losses(preserving[0]), losses(plain)
    assert held[0] == pytest.approx(free[0], rel=1e-6)
    assert all(with_class > without for with_class, without in zip(held[1:], free[1:], strict=True))
    digests = [tensor_digest(load(project.lora).tensors) for project in (preserving[0], plain)]
    assert digests[0] != digests[1]


def test_both_parts_of_the_loss_are_said_and_shown(preserving: tuple[Project, Path], plain: Project) -> None:
    lines = lines_of(preserving[0])
    for line in lines:
        assert line["loss_data"] + line["loss_preservation"] == pytest.approx(line["loss"], rel=1e-6)
    assert lines[0]["loss_preservation"] == pytest.approx(0.0, abs=1e-9)
    assert all(line["loss_preservation"] > 0 for line in lines[1:])
    # What holds the class is no part of it: the pictures' own loss is nearly that of a training without.
    assert [line["loss_data"] for line in lines] == pytest.approx(losses(plain), rel=0.01)
    assert not any("loss_data" in line or "loss_preservation" in line for line in lines_of(plain))
    titles = {panel.title.partition(" (")[0] for panel in panels(lines)} - {
        panel.title.partition(" (")[0] for panel in panels(lines_of(plain))
    }
    assert titles == {"loss of the pictures", "loss of holding the class"}


def test_the_class_is_held_only_at_every_nth_step(plain: Project, untrained: Project) -> None:
    untrained.make(*STAGES, sets=('train.preservation={kind = "output", class_word = "cat", every = 3}', *PLAIN))
    held, free = losses(untrained), losses(plain)
    assert held[:3] == pytest.approx(free[:3], rel=1e-6)
    assert held[3] > free[3]
    assert [line["step"] for line in lines_of(untrained) if "loss_preservation" in line] == [1, 4]
    assert all("loss_data" in line for line in lines_of(untrained))


def test_another_class_word_encodes_the_class_captions_again_and_nothing_else(untrained: Project) -> None:
    untrained.make("encode-text", sets=PRESERVED)
    again = untrained.run("encode-text", sets=('train.preservation={kind = "output", class_word = "dog"}',))
    assert (again.status, again.counts["encoded"]) == ("built", len(COLORS))
    assert untrained.run("encode-text").counts["encoded"] == 0


def test_several_class_words_take_turns_from_caption_to_caption(untrained: Project) -> None:
    three = untrained.run(
        "encode-text", sets=('train.preservation={kind = "output", class_word = ["cat", "dog", "owl"]}', *PLAIN)
    )
    rows = read_table(three.folder / "index.parquet", EMBEDDING_INDEX)
    words = [row["text"].split()[1] for row in rows if row["role"] == "class"]
    assert words == [word for word, _ in zip(itertools.cycle(("cat", "dog", "owl")), COLORS, strict=False)]
    refused = untrained.run("encode-text", sets=('train.preservation={kind = "output", class_word = []}',))
    assert refused.code == 2


def test_preservation_needs_a_trigger(untrained: Project) -> None:
    for caption in untrained.pictures.glob("*.txt"):
        caption.write_text("a cat")
    untrained.make("validate", sets=("validate.trigger=''",))
    ran = untrained.run("encode-text", sets=(*PRESERVED, "validate.trigger=''"))
    assert (ran.code, ran.error) == (2, "preservation.no_trigger")


def test_verify_follows_the_class_captions(preserving: tuple[Project, Path], tmp_path: Path) -> None:
    project = preserving[0].copy(tmp_path / "project")
    project.make("preview", sets=PRESERVED + PLAIN)
    assert project.run("verify", sets=PRESERVED + PLAIN).code == 0
    project.make("encode-text", sets=(*PLAIN, 'train.preservation={kind = "output", class_word = "dog"}'))
    broken = project.run("verify", sets=PRESERVED + PLAIN)
    assert (broken.code, broken.error) == (5, "chain.broken")
