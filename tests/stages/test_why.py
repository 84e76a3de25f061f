"""why: the exact thing that changed, followed back to where it began; and what is not a change."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from stages.inspection.lineage import MAKERS
from tests.stages.project import Project, Ran, draw, edit, flip, listing

STALE = "changed"


def why(project: Project, *stage: str, sets: tuple[str, ...] = ()) -> Ran:
    ran = project.run("why", *stage, sets=sets)
    assert ran.code == 0, ran.stderr
    return ran


def told(ran: Ran) -> dict[str, dict[str, Any]]:
    return {each["stage"]: each for each in ran.result["about"]["stages"]}


def roots(ran: Ran, stage: str) -> set[tuple[str, str, str]]:
    """What changed, as (name, old, new)."""
    return {(each["name"], each["old"], each["new"]) for each in told(ran)[stage]["changes"]}


def statuses(ran: Ran) -> dict[str, str]:
    return {stage: each["status"] for stage, each in told(ran).items()}


def test_finished_run_is_up_to_date_and_looking_leaves_no_trace(project: Project) -> None:
    before = listing(project.root)
    ran = why(project)
    assert statuses(ran) == dict.fromkeys(MAKERS, "up to date")
    assert ran.result["status"] == "up to date"
    assert listing(project.root) == before


def test_run_that_never_began_says_so(untrained: Project) -> None:
    ran = why(untrained)
    assert statuses(ran) == {
        **dict.fromkeys(("validate", "encode-latents", "encode-text"), "up to date"),
        **dict.fromkeys(("train", "preview"), "never made"),
    }
    assert "train: this run has not made it yet" in ran.stderr


def test_edited_caption_is_named_with_its_file_and_both_texts_in_every_stage_it_reaches(project: Project) -> None:
    (project.pictures / "bob.txt").write_text("a [trigger] with a hat")
    ran = why(project)
    change = ("bob.txt", '"a zorb called bob"', '"a zorb with a hat"')
    for stage in MAKERS:
        assert roots(ran, stage) == {change}, stage
    [train] = told(ran)["train"]["changes"]
    assert train["kind"] == "caption"
    assert train["through"] == ["validate", "encode-latents", "encode-text", "train"]
    assert 'bob.txt: "a zorb called bob" -> "a zorb with a hat"' in ran.stderr


def test_pixels_changed_under_the_same_name_are_named(project: Project) -> None:
    draw(project.pictures, "bob", (1, 2, 3))
    ran = why(project)
    assert {name for name, _, _ in roots(ran, "train")} == {"bob.png"}
    [change] = told(ran)["encode-latents"]["changes"]
    assert (change["kind"], change["through"]) == ("picture", ["validate", "encode-latents"])
    assert change["old"] != change["new"]
    assert statuses(ran)["encode-text"] == "up to date"


def test_added_and_removed_pictures_are_told_apart(project: Project) -> None:
    draw(project.pictures, "eve", (9, 9, 9))
    (project.pictures / "ada.png").unlink()
    (project.pictures / "ada.txt").unlink()
    ran = why(project, "train")
    assert roots(ran, "train") == {("eve.png", "not there", "added"), ("ada.png", "there", "removed")}


def test_renamed_picture_reaches_nothing_behind_validate(project: Project) -> None:
    for suffix in ("png", "txt"):
        (project.pictures / f"ada.{suffix}").rename(project.pictures / f"zoe.{suffix}")
    ran = why(project)
    assert roots(ran, "validate") == {("ada.png", "ada.png", "zoe.png")}
    assert statuses(ran) == {"validate": STALE, **dict.fromkeys(MAKERS[1:], "up to date")}


@pytest.mark.parametrize("data", [b"  a [trigger] called bob\r\n", b"\xef\xbb\xbfa [trigger] called bob"])
def test_bytes_that_change_no_caption_are_said_to(project: Project, data: bytes) -> None:
    (project.pictures / "bob.txt").write_bytes(data)
    ran = why(project)
    [(name, _, new)] = roots(ran, "validate")
    assert (name, new) == ("files in the folder", "other bytes, but no picture or caption differs")
    assert statuses(ran) == {"validate": STALE, **dict.fromkeys(MAKERS[1:], "up to date")}


def test_touched_pictures_and_comments_in_the_configuration_change_nothing(project: Project) -> None:
    for path in project.pictures.iterdir():
        path.touch()
    edit(project.config, "[train]", "# a comment\n[train]")
    assert statuses(why(project)) == dict.fromkeys(MAKERS, "up to date")


@pytest.mark.parametrize(
    ("setting", "change", "stale"),
    [
        ("train.learning_rate=2e-3", ("train.learning_rate", "0.001", "0.002"), {"train", "preview"}),
        ("run.seed=8", ("run.seed", "7", "8"), {"train", "preview"}),
        ("preview.size=48", ("preview.size", "32", "48"), {"preview"}),
        ("preview.prompts=['a red [trigger]', 'x']", ("preview.prompts", "[]", '["x"]'), {"encode-text", "preview"}),
        (
            "encode_latents.flip=true",
            ("encode_latents.flip", "false", "true"),
            {"encode-latents", "train", "preview"},
        ),
        (
            "validate.resolutions=[48]",
            ("validate.resolutions", "[32]", "[48]"),
            {"validate", "encode-latents", "train", "preview"},
        ),
    ],
)
def test_setting_is_named_where_it_stands_with_both_values(
    project: Project, setting: str, change: tuple[str, str, str], stale: set[str]
) -> None:
    ran = why(project, sets=(setting,))
    assert {stage for stage, status in statuses(ran).items() if status == STALE} == stale
    for stage in stale:
        assert roots(ran, stage) == {change}


def test_other_weights_of_same_name_and_size_are_named_by_their_part(own_model: Project) -> None:
    [file] = (own_model.root / "model" / "vae").glob("*.safetensors")
    flip(file, 0.9)
    ran = why(own_model)
    [(name, old, new)] = roots(ran, "encode-latents")
    assert name == f"the model's autoencoder ({file})"
    assert old != new
    assert statuses(ran)["encode-text"] == "up to date"


def test_other_version_of_a_stage_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.encode_text import EncodeText

    monkeypatch.setattr(EncodeText, "version", 2)
    ran = why(project, "encode-text")
    assert roots(ran, "encode-text") == {("the version of encode-text", "1", "2")}


def test_change_that_the_stage_before_has_taken_in_already_is_still_named(project: Project) -> None:
    (project.pictures / "bob.txt").write_text("a [trigger] with a hat")
    project.make("validate", "encode-latents", "encode-text")
    ran = why(project)
    assert statuses(ran)["encode-text"] == "up to date"
    assert roots(ran, "train") == {("bob.txt", '"a zorb called bob"', '"a zorb with a hat"')}


def test_artifact_that_is_gone_is_no_change(project: Project) -> None:
    shutil.rmtree(project.store / "train")
    ran = why(project)
    assert statuses(ran) == {**dict.fromkeys(MAKERS, "up to date"), "train": "gone"}


def test_unknown_stage_is_refused_with_those_there_are(project: Project) -> None:
    ran = project.run("why", "verify")
    assert ran.code == 2
    assert "encode-latents" in ran.stderr


def test_raised_format_of_the_store_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("contract.artifacts", "outlook.changes"):
        monkeypatch.setattr(f"stages.{module}.CONTRACT_VERSION", 2)
    ran = why(project)
    for stage in MAKERS:
        assert roots(ran, stage) == {("the store's format", "another", "2")}
