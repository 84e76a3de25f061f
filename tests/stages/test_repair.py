"""What is damaged is never called up to date: the plain re-run, and repair, make exactly that again."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.stages.project import Project, Ran, contents, draw, flip, listing, rows, truncate


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


def repair(project: Project, *more: str, stdin: bytes | None = None) -> Ran:
    if stdin is None:
        return project.run("repair", *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return project.run("repair", "-", *more)


def test_whole_run_needs_no_repair_and_nothing_is_written(project: Project) -> None:
    before = listing(project.root)
    ran = repair(project)
    assert (ran.code, ran.status, ran.counts) == (0, "up to date", {"errors": 0, "left": 0})
    assert listing(project.root) == before


def test_every_kind_of_damage_at_once_is_made_good(project: Project) -> None:
    whole = contents(project.results)
    lora = project.run("train").result["digest"]
    for place in ("validate/*/captions.parquet", "fragments/previews/*.png", "train/*/lora.safetensors"):
        flip(first(project.store, place))
    flip(first(project.store, "fragments/latents/*/c.0.0.0.0"), 0.1)
    (project.results / "encode-text.json").write_text("{}")
    (project.results / "preview_2.png").unlink()
    project.lora.write_bytes(b"")
    errors = project.run("verify").counts["errors"]
    assert errors >= 7
    ran = repair(project)
    assert (ran.code, ran.counts["errors"], ran.counts["left"], ran.counts["encoded"]) == (0, errors, 0, 1)
    healed = contents(project.results)
    assert {name for name in whole if healed[name] != whole[name]} <= {"verify.json"}
    assert project.run("train").result["digest"] == lora
    assert project.run("verify", "--deep").code == 0


def test_findings_come_from_a_verify_before(project: Project) -> None:
    flip(first(project.store, "fragments/embeddings/*"), 0.1)
    found = msgspec.json.encode(project.run("verify").result)
    ran = repair(project, stdin=found)
    assert (ran.code, ran.counts["errors"], ran.counts["encoded"]) == (0, 1, 1)
    assert repair(project, stdin=msgspec.json.encode(project.run("verify").result)).status == "up to date"
    assert repair(project, stdin=b"{}").error == "repair.findings"


def test_rot_that_no_stat_shows_is_repaired_too(project: Project) -> None:
    path = first(project.store, "encode-text/*/index.parquet")
    project.run("encode-text")
    stat = path.stat()
    old = stat.st_mtime_ns - 10_000_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.contract.digests.identity", lambda _: (1, 2, 3, 4))
        patch.setattr("stages.contract.digests.youngest_ns", lambda _: old)
        project.run("encode-text")
        flip(path)
        assert project.run("encode-text").status == "up to date"
        ran = repair(project)
    assert (ran.code, ran.counts["errors"], ran.counts["left"]) == (0, 1, 0)
    assert project.run("verify").code == 0


def test_what_nothing_can_be_made_from_stays_listed(project: Project) -> None:
    flip(first(project.store, "checkpoints/*/2/state.safetensors"))
    ran = repair(project)
    assert (ran.code, ran.error, ran.counts["left"]) == (4, "file.changed", 1)
    assert "--force" in ran.result["error"]["fix"]
    assert ran.stderr.endswith("1 things were wrong, 1 still are (nothing could be made again)\n")


def test_changed_dataset_is_no_damage_and_nothing_is_made_of_it(project: Project) -> None:
    draw(project.pictures, "ada", (1, 2, 3))
    before = listing(project.store, "lookup", ".locks", ".tmp")
    ran = repair(project)
    assert (ran.code, ran.error) == (5, "repair.changed")
    assert listing(project.store, "lookup", ".locks", ".tmp") == before
