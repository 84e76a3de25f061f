"""The chain as a whole: what each kind of change costs, and that nothing is done twice."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stages.project import (
    MAKING,
    Project,
    Ran,
    command,
    contents,
    draw,
    edit,
    flip,
    listing,
    new_project,
    truncate,
)

ENCODERS = ("encode-latents", "encode-text")
PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "cat-toy"


def statuses(ran: dict[str, Ran]) -> dict[str, str]:
    return {stage: each.status for stage, each in ran.items()}


def encodings(ran: dict[str, Ran]) -> dict[str, tuple[int, int]]:
    """(encoded, reused) of both encoders."""
    return {stage: (ran[stage].counts["encoded"], ran[stage].counts["reused"]) for stage in ENCODERS}


def all_up_to_date(ran: dict[str, Ran]) -> bool:
    return set(statuses(ran).values()) == {"up to date"}


def test_first_run_encodes_everything_once(tmp_path: Path, finished: Project) -> None:
    ran = new_project(tmp_path / "elsewhere").make()
    assert set(statuses(ran).values()) == {"built"}
    assert encodings(ran) == {"encode-latents": (4, 0), "encode-text": (6, 0)}
    assert ran["train"].counts == {"steps": 4, "resumed_from": 0}
    # Training drew the pictures of steps 0, 2 and 4 already.
    assert ran["preview"].counts == {"images": 3, "rendered": 0, "reused": 3}
    # Another folder, the same artifacts.
    again = finished.make()
    for stage in MAKING:
        assert (ran[stage].result["key"], ran[stage].result["digest"]) == (
            again[stage].result["key"],
            again[stage].result["digest"],
        )


def test_second_run_is_up_to_date_and_writes_nothing(project: Project) -> None:
    before = listing(project.store, "lookup"), listing(project.root / "runs")
    ran = project.make()
    assert all_up_to_date(ran)
    assert encodings(ran) == {"encode-latents": (0, 4), "encode-text": (0, 6)}
    assert (listing(project.store, "lookup"), listing(project.root / "runs")) == before


def test_changed_caption_encodes_that_text_only(project: Project) -> None:
    (project.pictures / "ada.txt").write_text("a [trigger] with a new name")
    assert encodings(project.make("validate", *ENCODERS)) == {"encode-latents": (0, 4), "encode-text": (1, 5)}


def test_changed_pixel_encodes_that_picture_only(project: Project) -> None:
    draw(project.pictures, "ada", (201, 30, 30))
    ran = project.make("validate", *ENCODERS)
    assert encodings(ran) == {"encode-latents": (1, 3), "encode-text": (0, 6)}
    assert ran["encode-text"].status == "up to date"
    assert project.run("train", sets=("train.steps=1",)).status == "built"


def test_edit_that_keeps_size_and_time_is_noticed(project: Project) -> None:
    path = project.pictures / "ada.png"
    before = path.stat()
    draw(project.pictures, "ada", (99, 30, 30))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert encodings(project.make("validate", *ENCODERS))["encode-latents"] == (1, 3)


def test_touching_everything_changes_nothing(project: Project) -> None:
    for path in [project.config, *project.pictures.iterdir()]:
        os.utime(path, (0, 0))
    assert all_up_to_date(project.make())


def test_renaming_every_picture_redoes_nothing_but_the_list(project: Project) -> None:
    for number, path in enumerate(sorted(project.pictures.glob("*.png"), reverse=True)):
        path.with_suffix(".txt").rename(path.with_name(f"{number}.txt"))
        path.rename(path.with_name(f"{number}.png"))
    ran = project.make()
    assert statuses(ran).pop("validate") == "built"
    assert all_up_to_date({stage: each for stage, each in ran.items() if stage != "validate"})


def test_added_picture_encodes_itself_and_its_caption(project: Project) -> None:
    draw(project.pictures, "eve", (0, 120, 120))
    assert encodings(project.make("validate", *ENCODERS)) == {"encode-latents": (1, 4), "encode-text": (1, 6)}
    # Taking it away again is a way back to what is there.
    (project.pictures / "eve.png").unlink()
    (project.pictures / "eve.txt").unlink()
    assert all_up_to_date(project.make())


def test_removed_picture_encodes_nothing(project: Project) -> None:
    (project.pictures / "ada.png").unlink()
    (project.pictures / "ada.txt").unlink()
    assert encodings(project.make("validate", *ENCODERS)) == {"encode-latents": (0, 3), "encode-text": (0, 5)}


@pytest.mark.parametrize(
    ("setting", "train", "rendered"),
    [
        ("train.learning_rate=2e-3", "built", 0),
        ("train.steps=5", "built", 0),
        ("train.checkpoint_every=3", "up to date", 0),
        ("preview.size=48", "up to date", 3),
        ("preview.steps=1", "up to date", 3),
    ],
)
def test_changed_setting_encodes_nothing(project: Project, setting: str, train: str, rendered: int) -> None:
    ran = project.make(sets=(setting,))
    assert all_up_to_date({stage: ran[stage] for stage in ("validate", *ENCODERS)})
    assert (ran["train"].status, ran["preview"].counts["rendered"]) == (train, rendered)
    # And back: everything is still there.
    assert all_up_to_date(project.make())


def test_new_prompt_encodes_one_text_and_draws_it_at_every_step_without_training(project: Project) -> None:
    edit(project.config, '["a red [trigger]"]', '["a red [trigger]", "a blue [trigger]"]')
    ran = project.make()
    assert encodings(ran) == {"encode-latents": (0, 4), "encode-text": (1, 6)}
    assert ran["train"].status == "up to date"
    assert ran["preview"].counts == {"images": 6, "rendered": 3, "reused": 3}
    for step in (0, 2, 4):
        assert (project.results / f"preview_{step}_2.png").is_file()


def test_undone_change_finds_everything(project: Project) -> None:
    path = project.pictures / "ada.txt"
    before = path.read_text()
    path.write_text("something else entirely")
    project.make("validate", *ENCODERS)
    path.write_text(before)
    assert all_up_to_date(project.make())


def test_second_run_on_the_same_store_shares_everything(project: Project) -> None:
    other = replace(project, name="dog")
    other.config.write_bytes(project.config.read_bytes())
    assert all_up_to_date(other.make())
    mine, theirs = contents(project.results), contents(other.results)
    assert theirs == {name.replace("cat.", "dog."): data for name, data in mine.items()}


def test_lost_results_come_back_to_the_byte_without_work(project: Project) -> None:
    before = contents(project.results)
    shutil.rmtree(project.root / "runs")
    assert all_up_to_date(project.make())
    assert contents(project.results) == before


def test_each_lost_result_is_restored_and_every_altered_one(project: Project) -> None:
    before = contents(project.results)
    for name in before:
        (project.results / name).unlink()
        assert all_up_to_date(project.make())
        assert contents(project.results) == before, name
    for name in before:
        (project.results / name).write_bytes(b"something else")
    assert all_up_to_date(project.make())
    assert contents(project.results) == before


def test_user_files_are_never_touched(project: Project) -> None:
    before = listing(project.pictures)
    project.make("validate", *ENCODERS, sets=("validate.resolutions=[48]", "encode_latents.flip=true"))
    project.make()
    project.run("verify")
    assert listing(project.pictures) == before


FRAGMENTS = {"encode-latents": "latents/*/c.0.0.0.0", "encode-text": "embeddings/*.parquet"}
# Reads every latent and every caption.
ALL_READ = ("train.learning_rate=2e-3", "train.steps=2", "train.caption_dropout=0", "preview.during_training=false")


def fragment(project: Project, stage: str) -> Path:
    [path] = (project.store / "fragments").glob(FRAGMENTS[stage])
    return path


@pytest.mark.parametrize("stage", ENCODERS)
@pytest.mark.parametrize("harm", [Path.unlink, truncate])
def test_lost_or_short_fragment_stops_training_and_is_encoded_again(
    untrained: Project, stage: str, harm: Callable[[Path], None]
) -> None:
    before = fragment(untrained, stage).read_bytes()
    harm(fragment(untrained, stage))
    refused = untrained.run("train")
    assert refused.code == 4
    assert stage in refused.result["error"]["fix"]
    healed = untrained.run(stage)
    assert (healed.code, healed.counts["encoded"]) == (0, healed.counts["total"])
    assert "missing or damaged" in healed.stderr
    assert fragment(untrained, stage).read_bytes() == before


@pytest.mark.parametrize("stage", ENCODERS)
def test_flipped_bit_in_a_fragment_stops_training_until_forced_anew(untrained: Project, stage: str) -> None:
    before = fragment(untrained, stage).read_bytes()
    flip(fragment(untrained, stage), 0.1)
    refused = untrained.run("train", sets=ALL_READ)
    assert refused.code == 4
    assert refused.result["error"]["fix"].startswith(f"flux2-lora {stage} ")
    assert refused.result["error"]["fix"].endswith("--force")
    assert untrained.run(stage, "--force").code == 0
    assert fragment(untrained, stage).read_bytes() == before


def test_remedies_typed_as_they_stand_lead_to_the_end(encoded: Project, tmp_path: Path) -> None:
    """Settings and places of the command line are in them, quoted where a shell wants it."""
    project = encoded.copy(tmp_path / "my project")
    sets = ("validate.resolutions=[48]", "train.steps=1", "preview.prompts=['a [trigger]']")
    said: list[str] = []
    for _ in range(3):
        refused = project.run("train", sets=sets)
        program, *arguments = shlex.split(refused.result["error"]["fix"])
        assert (refused.code, program) == (5, "flux2-lora")
        assert command(*arguments, "--json").code == 0
        said.append(arguments[0])
    assert said == ["validate", "encode-latents", "encode-text"]
    assert project.run("train", sets=sets).code == 0


def test_run_name_and_places_change_no_digest(tmp_path: Path, finished: Project) -> None:
    moved = Project(tmp_path / "moved")
    shutil.copytree(finished.root, moved.root)
    assert all_up_to_date(moved.make())


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not in the repository")
def test_photographs_become_a_lora(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    shutil.rmtree(project.pictures)
    shutil.copytree(PHOTOGRAPHS, project.pictures)
    sets = ("validate.resolutions=[64]", "validate.trigger=cat toy")
    ran = project.make(sets=sets)
    pictures = len(list(PHOTOGRAPHS.glob("*.jpeg")))
    assert ran["validate"].counts["accepted"] == pictures
    assert encodings(ran)["encode-latents"] == (pictures, 0)
    assert project.lora.is_file()
    assert all_up_to_date(project.make(sets=sets))
    assert project.run("verify", sets=sets).code == 0
