"""gc: what no run uses goes when asked to, and nothing else ever does."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from typing import Any

import msgspec
import pytest

from stages.cli import run
from stages.contract.locks import share
from stages.contract.runner import store_lock
from tests.stages.project import Project, contents, draw, edit, listing, rows

DAY_SECONDS = 86_400


def gc(project: Project, *more: str, runs: tuple[str, ...] = ("runs",)) -> tuple[int, dict[str, Any], str]:
    places = [part for each in runs for part in ("--runs", str(project.root / each))]
    out, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = run(["gc", "--store", str(project.store), *places, *more, "--json"])
    out.seek(0)
    return code, msgspec.json.decode(out.read()), errors.getvalue()


def kinds(result: dict[str, Any]) -> dict[str, int]:
    listed = [each["kind"] for each in result["about"]["unreachable"]]
    return {kind: listed.count(kind) for kind in listed}


def aged(project: Project, days: float = 3) -> None:
    """Let everything in the store be as old as that."""
    then = time.time() - days * DAY_SECONDS
    for path in project.store.rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)


@pytest.fixture
def moved_on(project: Project) -> Project:
    """A run that was trained, then got another caption and another rate, and was trained again."""
    (project.pictures / "ada.txt").write_text("another caption")
    edit(project.config, "learning_rate = 1e-3", "learning_rate = 2e-3")
    project.make()
    aged(project)
    return project


def test_what_somebody_put_into_the_store_stays(moved_on: Project) -> None:
    mine = [f"{folder}/notes.txt" for folder in ("train", "fragments/latents", "checkpoints", "preview")]
    for name in mine:
        (moved_on.store / name).write_text("mine")
    (moved_on.store / "train" / "backup").mkdir()
    code, result, _ = gc(moved_on, "--older-than", "0", "--delete")
    assert (code, result["status"]) == (0, "built")
    assert [(moved_on.store / name).read_text() for name in mine] == ["mine"] * 4
    assert (moved_on.store / "train" / "backup").is_dir()


def test_finished_run_leaves_nothing_to_collect(project: Project) -> None:
    aged(project)
    code, result, said = gc(project)
    assert (code, result["status"]) == (0, "up to date")
    assert result["counts"] == {"runs": 1, "unreachable": 0, "bytes": 0, "deleted": 0, "compacted": 0}
    assert "1 runs use the rest" in said


def test_what_is_not_in_use_is_shown_and_stays(moved_on: Project) -> None:
    before = listing(moved_on.root)
    code, result, said = gc(moved_on)
    assert code == 0
    assert kinds(result) == {
        "checkpoints": 1,
        "encode-latents": 1,
        "encode-text": 1,
        "fragments/previews": 2,
        "preview": 1,
        "train": 1,
        "validate": 1,
    }
    assert result["counts"]["bytes"] == sum(each["bytes"] for each in result["about"]["unreachable"]) > 1e6
    assert result["counts"]["deleted"] == 0
    assert "--delete" in said
    assert "Not in use" in said
    assert listing(moved_on.root) == before


def test_delete_takes_exactly_what_was_shown(moved_on: Project) -> None:
    shown = {each["path"] for each in gc(moved_on)[1]["about"]["unreachable"]}
    code, result, _ = gc(moved_on, "--delete")
    assert (code, result["status"], result["counts"]["deleted"]) == (0, "built", len(shown))
    assert not any((moved_on.store / path).exists() for path in shown)
    assert moved_on.run("verify", "--deep").code == 0
    assert [ran.status for ran in moved_on.make().values()] == ["up to date"] * 5
    assert gc(moved_on, "--older-than", "0")[1]["counts"]["unreachable"] == 0


def test_what_is_young_stays(moved_on: Project) -> None:
    assert gc(moved_on, "--older-than", "4", "--delete")[1]["counts"]["deleted"] == 0
    assert gc(moved_on, "--older-than", "2")[1]["counts"]["unreachable"] == 8


def test_runs_in_other_folders_keep_what_they_use_when_they_are_named(moved_on: Project) -> None:
    shutil.copytree(moved_on.root / "runs", moved_on.root / "elsewhere")
    edit(moved_on.config, "learning_rate = 2e-3", "learning_rate = 3e-3")
    moved_on.make()
    aged(moved_on)
    alone = gc(moved_on)[1]["counts"]["unreachable"]
    both = gc(moved_on, runs=("runs", "elsewhere"))[1]["counts"]
    assert (both["unreachable"], both["runs"]) == (8, 2)
    assert alone > 8


def test_pinned_run_keeps_what_it_used_until_the_pin_is_removed(project: Project) -> None:
    assert gc(project, "--pin", "cat")[0] == 0
    pinned = contents(project.store / "train")
    edit(project.config, "learning_rate = 1e-3", "learning_rate = 2e-3")
    project.make()
    aged(project)
    assert gc(project, "--delete")[1]["counts"]["deleted"] == 0
    assert pinned.items() <= contents(project.store / "train").items()
    shutil.rmtree(project.store / "pins" / "cat")
    assert kinds(gc(project)[1])["train"] == 1
    code, result, _ = gc(project, "--pin", "dog")
    assert (code, result["error"]["code"]) == (2, "gc.unknown_run")


@pytest.mark.parametrize("link", ["pins", "pins/cat"])
def test_pin_is_written_nowhere_else(moved_on: Project, link: str) -> None:
    place, elsewhere = moved_on.store / link, moved_on.root / "elsewhere"
    place.parent.mkdir(exist_ok=True)
    elsewhere.mkdir()
    place.symlink_to(elsewhere)
    code, result, _ = gc(moved_on, "--pin", "cat")
    assert (code, result["error"]["code"]) == (2, "output.symlink")
    assert list(elsewhere.iterdir()) == []


def test_nothing_is_deleted_while_a_stage_works_on_the_store(moved_on: Project) -> None:
    before = listing(moved_on.store)
    with share(store_lock(moved_on.store), lambda _: None):
        code, result, _ = gc(moved_on, "--delete")
        assert (code, result["error"]["code"]) == (6, "lock.held")
        assert gc(moved_on)[1]["counts"]["unreachable"] == 8
    assert listing(moved_on.store).keys() == before.keys()
    assert gc(moved_on, "--delete")[1]["counts"]["deleted"] == 8


@pytest.mark.parametrize("key", ["../../../elsewhere", "..", "/etc", "", "A" * 64])
def test_receipt_whose_key_leads_elsewhere_stops_everything(moved_on: Project, key: str) -> None:
    """Looked for there, its artifact would be nobody's here."""
    receipt = moved_on.results / "train.json"
    listed = msgspec.json.decode(receipt.read_bytes())
    receipt.write_bytes(msgspec.json.encode({**listed, "key": key}))
    before = listing(moved_on.store / "train")
    exit_code, result, _ = gc(moved_on, "--delete")
    assert (exit_code, result["error"]["code"]) == (4, "gc.receipt")
    assert listing(moved_on.store / "train") == before
    assert moved_on.run("verify").error == "receipt.unreadable"
    # As the remedy says.
    assert moved_on.run("train").code == 0
    assert gc(moved_on)[0] == 0


@pytest.mark.parametrize(("name", "code"), [("train.json", "gc.receipt"), ("trajectory.json", "gc.note")])
def test_run_that_cannot_be_read_stops_everything(moved_on: Project, name: str, code: str) -> None:
    (moved_on.results / name).write_text("{")
    before = listing(moved_on.store / "train")
    exit_code, result, _ = gc(moved_on, "--delete")
    assert (exit_code, result["error"]["code"]) == (4, code)
    assert listing(moved_on.store / "train") == before


def test_note_of_another_training_than_it_lists_stops_everything(moved_on: Project) -> None:
    """By the trajectory alone its checkpoints would be nobody's."""
    note = moved_on.results / "trajectory.json"
    before, data = listing(moved_on.store / "checkpoints"), note.read_bytes()
    at = data.index(b'"trajectory": "') + len(b'"trajectory": "')
    note.write_bytes(data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :])
    exit_code, result, _ = gc(moved_on, "--delete")
    assert (exit_code, result["error"]["code"]) == (4, "gc.note")
    assert listing(moved_on.store / "checkpoints") == before


def test_packed_weights_stay_as_long_as_a_run_holds_its_model_so(project: Project) -> None:
    packed, plain = ("model.quantize=8bit",), ("model.quantize=none",)
    project.make("quantize", "train", sets=packed)
    aged(project)
    assert "quantized-transformer" not in kinds(gc(project)[1])
    project.make("train", sets=plain)
    aged(project)
    assert kinds(gc(project)[1])["quantized-transformer"] == 1
    gc(project, "--delete")
    assert not list((project.store / "quantized-transformer").iterdir())


def test_no_run_at_all_is_no_reason_to_delete_everything(moved_on: Project) -> None:
    code, result, _ = gc(moved_on, "--delete", runs=("nowhere",))
    assert (code, result["error"]["code"]) == (2, "gc.no_runs")
    assert moved_on.run("verify").code == 0


def test_folder_of_runs_that_is_not_there_is_no_reason_to_delete_what_its_runs_use(moved_on: Project) -> None:
    assert gc(moved_on, "--pin", moved_on.name)[0] == 0
    for runs in (("nowhere",), ("runs", "nowhere")):
        code, result, _ = gc(moved_on, "--older-than", "0", "--delete", runs=runs)
        assert (code, result["error"]["code"]) == (2, "gc.no_runs")
        assert result["error"]["where"].partition(":")[0].endswith("nowhere")
    assert moved_on.run("verify").code == 0


def test_what_others_put_there_and_what_is_no_artifact_stays(moved_on: Project) -> None:
    for name in ("notes.txt", "mine/picture.png", "fragments/other/thing", "pins/readme"):
        path = moved_on.store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    kept = ("lookup", "models", "mine", "fragments/other", "pins", "notes.txt")
    before = {name: each for name, each in listing(moved_on.store).items() if name.startswith(kept)}
    gc(moved_on, "--older-than", "0", "--delete")
    after = listing(moved_on.store)
    assert {name: after.get(name) for name in before} == before


def test_work_that_dead_processes_left_goes(project: Project) -> None:
    folder = project.store / ".tmp" / "dead"
    folder.mkdir(parents=True)
    (folder / "half").write_text("half")
    assert gc(project)[1]["counts"]["unreachable"] == 0
    aged(project)
    assert kinds(gc(project, "--delete")[1]) == {"work left behind": 1}
    assert not folder.exists()


def test_deletion_that_was_killed_is_finished_by_the_next(project: Project) -> None:
    work = project.store / ".tmp"
    (work / ("a" * 32) / "0").mkdir(parents=True)
    (work / f"{'a' * 32}.lock").touch()
    assert gc(project, "--delete")[1]["counts"]["deleted"] == 0
    assert list(work.iterdir()) == []


def test_small_fragments_are_put_together_without_changing_any_digest(untrained: Project) -> None:
    for name, color in {"eva": (9, 9, 9), "fay": (99, 9, 9), "gil": (9, 99, 9)}.items():
        draw(untrained.pictures, name, color)
        untrained.make("validate", "encode-latents", "encode-text")
    before = untrained.make("validate", "encode-latents", "encode-text")
    aged(untrained)
    indices = [
        sorted((untrained.store / stage).glob("*/index.parquet")) for stage in ("encode-latents", "encode-text")
    ]
    assert gc(untrained, "--compact")[1]["counts"]["compacted"] == 2
    code, result, _ = gc(untrained, "--compact", "--delete")
    assert (code, result["counts"]["compacted"]) == (0, 2)
    assert kinds(result)["fragments/latents"] == kinds(result)["fragments/embeddings"] == 4
    for (path,) in [[each for each in found if each.exists()] for found in indices]:
        assert len({row["fragment"] for row in rows(path)}) == 1
    again = untrained.make("validate", "encode-latents", "encode-text")
    for stage, ran in again.items():
        assert (ran.status, ran.result["digest"]) == ("up to date", before[stage].result["digest"])
    untrained.make()
    assert untrained.run("verify", "--deep", "--recompute", "100%").code == 0
    assert gc(untrained, "--compact")[1]["counts"]["compacted"] == 0
