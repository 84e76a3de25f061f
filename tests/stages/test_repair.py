"""What is damaged is never called up to date: the plain re-run, and repair, make exactly that again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stages.project import Project, flip, rows, truncate


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


@pytest.mark.parametrize("harm", [flip, truncate])
@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("validate", "validate/*/dataset.parquet"),
        ("encode-latents", "encode-latents/*/index.parquet"),
        ("encode-text", "encode-text/*/index.parquet"),
        ("train", "train/*/lora.safetensors"),
        ("preview", "fragments/previews/*.png"),
    ],
)
def test_damaged_artifact_is_not_up_to_date_and_comes_back_the_same(
    project: Project, harm: Callable[[Path], None], stage: str, place: str
) -> None:
    path = first(project.store, place)
    whole, before = path.read_bytes(), project.run(stage).result
    harm(path)
    ran = project.run(stage)
    assert (ran.code, ran.status, "making them again" in ran.stderr) == (0, "built", True)
    assert path.read_bytes() == whole
    assert (ran.result["key"], ran.result["digest"]) == (before["key"], before["digest"])
    assert project.run(stage).status == "up to date"


@pytest.mark.parametrize(
    ("stage", "kind", "place"), [("encode-latents", "latents", "*/c.0.0.0.0"), ("encode-text", "embeddings", "*")]
)
def test_only_the_damaged_record_of_a_fragment_is_encoded_again(
    project: Project, stage: str, kind: str, place: str
) -> None:
    before = project.run(stage).result
    index = first(project.store, f"{stage}/*/index.parquet")
    total = len({row["fragment"] for row in rows(index)})
    flip(first(project.store, f"fragments/{kind}/{place}"), 0.1)
    ran = project.run(stage)
    assert (ran.status, ran.counts["encoded"]) == ("built", 1)
    assert ran.result["digest"] == before["digest"]
    assert len({row["fragment"] for row in rows(index)}) == total + 1
    assert project.run("verify").code == 0


@pytest.mark.parametrize(
    ("consumer", "place"),
    [
        ("encode-latents", "validate/*/dataset.parquet"),
        ("encode-text", "validate/*/captions.parquet"),
        ("train", "encode-latents/*/index.parquet"),
        ("train", "encode-text/*/index.parquet"),
        ("preview", "train/*/lora.safetensors"),
    ],
)
def test_consumer_refuses_a_damaged_input_and_names_the_stage_that_makes_it(
    project: Project, consumer: str, place: str
) -> None:
    path = first(project.store, place)
    flip(path)
    ran = project.run(consumer)
    assert (ran.code, ran.error) == (4, "file.changed")
    assert ran.result["error"]["where"].startswith(str(path))
    assert f"flux2-lora {place.partition('/')[0]} " in ran.result["error"]["fix"]
