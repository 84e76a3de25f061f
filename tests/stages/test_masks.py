"""Masks and pictures of the class through all stages: what is encoded, what training reads, what it changes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from schemas.tables import DRAWS, MASK_INDEX
from stages.stores.tables import read_table
from stages.training.data import Batch, Sample, TrainingData
from tests.stages.project import MAKING, Project, draw

QUIET = "preview.during_training=false"
ENCODING = MAKING[:3]
FILES = 'validate.masks="files"'
MASK = "train.mask={outside = 0.0}"
PRIOR = ('validate.class_dataset="others"', 'train.preservation={kind = "prior", weight = 0.5}')


def losses(project: Project) -> list[float]:
    lines = (project.results / "metrics.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line)["loss"] for line in lines]


def cover(project: Project, name: str, *, left: int) -> None:
    """Put a mask beside a picture that is white in its first `left` columns of 48."""
    values = np.zeros((48, 48), np.uint8)
    values[:, :left] = 255
    Image.fromarray(values).save(project.pictures / f"{name}.mask.png")


def read_batches(project: Project, patch: pytest.MonkeyPatch, *sets: str) -> list[tuple[list[Sample], Batch]]:
    """Train and return what was read, in order."""
    found: list[tuple[list[Sample], Batch]] = []
    read = TrainingData.read

    def recorded(data: TrainingData, samples: list[Sample], *, classes: bool = False) -> Batch:
        found.append((samples, read(data, samples, classes=classes)))
        return found[-1][1]

    with patch.context() as patched:
        patched.setattr(TrainingData, "read", recorded)
        project.make("train", sets=(QUIET, *sets))
    return found


def test_a_mask_is_encoded_by_itself_and_a_changed_one_alone(untrained: Project) -> None:
    for name in ("ada", "bob"):
        cover(untrained, name, left=24 if name == "ada" else 12)
    first = untrained.make(*ENCODING, sets=(FILES,))["encode-latents"]
    assert first.counts == {"total": 6, "encoded": 2, "reused": 4}
    assert len(read_table(first.folder / "masks.parquet", MASK_INDEX)) == 2
    cover(untrained, "ada", left=48)
    again = untrained.make(*ENCODING, sets=(FILES,))
    assert again["encode-latents"].counts == {"total": 6, "encoded": 1, "reused": 5}
    assert again["encode-text"].status == "up to date"
    flipped = untrained.make(*ENCODING, sets=(FILES, "encode_latents.flip=true"))["encode-latents"]
    assert flipped.counts == {"total": 12, "encoded": 6, "reused": 6}


def test_training_reads_the_mask_of_each_picture_and_its_mirror(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cover(untrained, "ada", left=12)
    sets = (FILES, MASK, "encode_latents.flip=true", "train.steps=8")
    ran = untrained.make(*ENCODING, sets=sets)
    masked = {
        row["item_id"] for row in read_table(ran["validate"].folder / "draws.parquet", DRAWS) if row["mask_path"]
    }
    seen = set()
    for samples, batch in read_batches(untrained, monkeypatch, *sets):
        assert batch.masks is not None
        for sample, mask in zip(samples, batch.masks, strict=True):
            expected = np.ones((2, 2)) if sample.visit not in masked else [[0.5, 0]] * 2
            assert np.array_equal(mask[0], np.array(expected)[:, ::-1] if sample.flip else expected)
            seen.add((sample.visit in masked, sample.flip))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_masks_act_on_training_only_where_it_asks_for_them(untrained: Project, tmp_path: Path) -> None:
    for name in ("ada", "bob", "cyd", "dot"):
        cover(untrained, name, left=24)
    bare = untrained.copy(tmp_path / "bare")
    for mask in bare.pictures.glob("*.mask.png"):
        mask.unlink()
    ran = [
        project.make(*ENCODING, "train", sets=sets)
        for project, sets in ((untrained, (FILES, QUIET)), (bare, (QUIET,)))
    ]
    assert ran[0]["train"].result["key"] == ran[1]["train"].result["key"]
    assert ["nothing reads" in each["train"].stderr for each in ran] == [True, False]
    assert losses(untrained) == losses(bare)
    untrained.make("train", "preview", sets=(FILES, MASK, QUIET))
    assert all(there != here for there, here in zip(losses(bare), losses(untrained), strict=True))
    assert untrained.run("verify", sets=(FILES, MASK, QUIET)).code == 0


def test_picture_changed_after_validate_is_refused_by_its_mask_too(untrained: Project) -> None:
    cover(untrained, "ada", left=12)
    untrained.make("validate", sets=(FILES,))
    stale = untrained.copy(untrained.root.parent / "stale")
    cover(stale, "ada", left=24)
    assert (stale.run("encode-latents", sets=(FILES,)).code, stale.run("train").code) == (5, 5)


def test_masks_of_training_need_masks_of_the_dataset(untrained: Project) -> None:
    refused = untrained.run("train", sets=(MASK,))
    assert (refused.code, refused.error) == (2, "config.wrong_value")
    assert "validate.masks" in refused.stderr


def test_class_pictures_are_cached_rows_that_count_by_their_weight(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, color in {"eve": (90, 90, 90), "fox": (120, 60, 10)}.items():
        draw(untrained.root / "others", name, color, f"a spot called {name}")
    ran = untrained.make(*ENCODING, sets=PRIOR)
    assert ran["encode-latents"].counts == {"total": 6, "encoded": 2, "reused": 4}
    assert ran["encode-text"].counts == {"total": 8, "encoded": 2, "reused": 6}
    rows = read_table(ran["validate"].folder / "draws.parquet", DRAWS)
    of_class = {row["item_id"] for row in rows if row["prior"]}
    assert len(of_class) == 2
    batches = read_batches(untrained, monkeypatch, *PRIOR, "train.steps=6")
    flags = [
        pair for samples, batch in batches for pair in zip([each.visit for each in samples], batch.prior, strict=True)
    ]
    assert all(flag == (visit in of_class) for visit, flag in flags)
    assert sum(flag for _, flag in flags) == 4
    light = losses(untrained)
    heavier = (PRIOR[0], 'train.preservation={kind = "prior", weight = 2.0}')
    untrained.make("train", sets=(*heavier, QUIET, "train.steps=6"))
    heavy = losses(untrained)
    # The same pictures at the same noise: where one of the class is in the batch its loss counts four times as much.
    first = next(step for step, (_, batch) in enumerate(batches) if any(batch.prior))
    assert light[:first] == heavy[:first]
    assert heavy[first] > light[first]
    assert untrained.run("preview", sets=(*heavier, QUIET, "train.steps=6")).code == 0
    assert untrained.run("verify", sets=(*heavier, QUIET, "train.steps=6")).code == 0


def test_class_folder_moved_is_found_again_without_encoding(untrained: Project) -> None:
    draw(untrained.root / "others", "eve", (90, 90, 90), "a spot called eve")
    untrained.make(*ENCODING, sets=PRIOR)
    (untrained.root / "others").rename(untrained.root / "elsewhere")
    moved = ('validate.class_dataset="elsewhere"', PRIOR[1])
    ran = untrained.make(*ENCODING, sets=moved)
    assert {stage: each.status for stage, each in ran.items()} == {
        "validate": "built",
        "encode-latents": "up to date",
        "encode-text": "up to date",
    }


@pytest.mark.parametrize("name", ["nowhere", "pictures", "pictures/inside", "."])
def test_class_folder_that_is_absent_or_part_of_the_dataset_is_refused(untrained: Project, name: str) -> None:
    (untrained.pictures / "inside").mkdir()
    refused = untrained.run("validate", sets=(f'validate.class_dataset="{name}"', PRIOR[1]))
    assert (refused.code, refused.error) == (2, "dataset.class_folder")


def test_class_pictures_and_prior_preservation_need_each_other(untrained: Project) -> None:
    for sets in (PRIOR[:1], PRIOR[1:]):
        refused = untrained.run("validate", sets=sets)
        assert (refused.code, refused.error) == (2, "config.wrong_value")
