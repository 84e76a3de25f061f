"""plan: what it foresees against what the stages then do; memory, disk and time; and that it leaves no trace."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import pytest

from stages.contract.config import load_config
from stages.contract.job import Job
from stages.flux2.backend import Backend
from stages.flux2.variants import VARIANTS
from stages.inspection.lineage import MAKERS
from stages.outlook.chain import look_ahead
from stages.outlook.needs import ARTIFACT_BYTES, Needs
from stages.training import memory
from tests.stages.project import Project, Ran, command, draw, listing, new_project, stop_after
from tests.training.test_memory import MEASURED

HUB = 'model.source="black-forest-labs/FLUX.2-klein-base-4B"'


def plan(project: Project, *more: str, sets: tuple[str, ...] = ()) -> Ran:
    return project.run("plan", *more, sets=sets)


def rows(ran: Ran) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in ran.result["about"]["rows"]}


def foreseen(ran: Ran) -> dict[str, dict[str, int]]:
    return {stage: row["counts"] for stage, row in rows(ran).items()}


def done(project: Project, *, sets: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    return {stage: ran.counts for stage, ran in project.make(sets=sets).items()}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_counts_foreseen_before_anything_ran_are_those_of_the_run(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    before = listing(project.root)
    ran = plan(project)
    assert ran.code == 0, ran.stderr
    assert listing(project.root) == before
    assert {row["why"]["status"] for row in rows(ran).values()} == {"never made"}
    assert foreseen(ran) == done(project)


def test_finished_run_has_nothing_to_do(project: Project) -> None:
    before = listing(project.root)
    ran = plan(project)
    assert listing(project.root) == before
    assert ran.result["status"] == "up to date"
    assert [row["to_do"] for row in rows(ran).values()] == [0] * len(MAKERS)
    assert foreseen(ran) == done(project)


@pytest.mark.parametrize(
    "sets",
    [
        ("preview.prompts=['a red [trigger]', 'a blue one', 'a blue one']",),
        ("preview.prompts=['a red [trigger]', 'a blue one']", "train.learning_rate=2e-3"),
        ("preview.during_training=false", "train.steps=6"),
        ("train.steps=7",),
        ("encode_latents.flip=true", "encode_text.dtype='float32'"),
        ("validate.resolutions=[32, 48]", "train.checkpoint_every=3"),
        ("train.ema.decay=0.9", "preview.ema=true"),
        ("train.rotation={keep_last=1, keep_best=false}", "train.steps=9"),
        ("train.rotation={keep_every=4, keep_best=false}", "train.steps=9", "preview.during_training=false"),
        ("train.steps=2",),
        ("validate.masks='alpha'", "train.mask={}", "train.preservation={kind='output', class_word='cat'}"),
    ],
)
def test_counts_foreseen_after_a_change_are_those_of_the_run(project: Project, sets: tuple[str, ...]) -> None:
    ran = plan(project, sets=sets)
    assert foreseen(ran) == done(project, sets=sets)


def test_edited_caption_and_new_picture_are_foreseen_one_by_one(project: Project) -> None:
    (project.pictures / "bob.txt").write_text("a [trigger] with a hat")
    draw(project.pictures, "eve", (9, 9, 9))
    ran = plan(project)
    found = foreseen(ran)
    assert found["encode-latents"] == {"total": 5, "encoded": 1, "reused": 4}
    assert found["encode-text"] == {"total": 7, "encoded": 2, "reused": 5}
    assert found == done(project)


def test_interrupted_training_goes_on_from_where_the_plan_says(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("train.steps=8",)
    with monkeypatch.context() as patch:
        stop_after(3, signal.SIGTERM, patch)
        assert untrained.run("train", sets=sets).code == 143
    ran = plan(untrained, sets=sets)
    start = rows(ran)["train"]["counts"]["resumed_from"]
    assert 3 <= start < 8
    assert rows(ran)["train"]["to_do"] == 8 - start
    assert foreseen(ran) == done(untrained, sets=sets)


def test_lost_fragment_is_counted_alone(project: Project) -> None:
    [*_, fragment] = sorted((project.store / "fragments" / "embeddings").iterdir())
    fragment.unlink()
    ran = plan(project)
    lost = rows(ran)["encode-text"]
    assert (lost["why"]["status"], lost["to_do"] > 0) == ("gone", True)
    assert rows(ran)["train"]["to_do"] == 0
    assert foreseen(ran)["encode-text"] == project.make("encode-text")["encode-text"].counts


def test_disk_foreseen_holds_what_is_then_written_and_of_records_not_a_tenth_more(tmp_path: Path) -> None:
    project = new_project(tmp_path / "project")
    # Records large enough to tell them from tables and manifests.
    sets = ("validate.resolutions=[256]", "validate.upscale=true", "train.rank=16", "preview.size=128")
    needs = {stage: row["need"] for stage, row in rows(plan(project, sets=sets)).items()}
    for stage in MAKERS:
        store, run = bytes_in(project.store), bytes_in(project.results)
        assert project.run(stage, sets=sets).code == 0
        leave_out = bytes_in(project.store / "models") if stage == "encode-latents" else 0
        grown = bytes_in(project.store) - store - leave_out, bytes_in(project.results) - run
        for found, expected in zip(grown, (needs[stage]["store_bytes"], needs[stage]["run_bytes"]), strict=True):
            assert found <= expected + ARTIFACT_BYTES, stage
            if stage.startswith("encode"):
                assert expected <= 1.1 * found + ARTIFACT_BYTES, stage


def test_plan_takes_less_than_a_second_of_processor_time(project: Project) -> None:
    draw(project.pictures, "eve", (9, 9, 9))
    plan(project)
    before = time.process_time()
    plan(project)
    assert time.process_time() - before < 1


def test_model_that_is_not_here_is_planned_by_its_published_shape(project: Project) -> None:
    ran = plan(project, sets=(HUB, "validate.resolutions=[512]", "validate.upscale=true", "train.batch_size=1"))
    assert ran.result["about"]["model"] == "klein-base-4b"
    assert not ran.result["about"]["model_is_here"]
    assert "flux2-lora fetch black-forest-labs/FLUX.2-klein-base-4B" in ran.stderr
    found = rows(ran)
    assert found["encode-latents"]["counts"] == {"total": 4, "encoded": 4, "reused": 0}
    # 7680 numbers for each of 512 tokens, in bfloat16.
    texts = found["encode-text"]["counts"]["encoded"]
    assert found["encode-text"]["need"]["store_bytes"] >= texts * 512 * 7680 * 2
    assert found["encode-text"]["need"]["peak_bytes"] > 12e9


def test_stage_that_cannot_fit_ends_the_plan_with_settings_that_do(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_physical_bytes", lambda: int(25e9))
    sets = (HUB, "validate.resolutions=[512]", "validate.upscale=true", "train.batch_size=1")
    ran = plan(project, sets=sets)
    assert (ran.code, ran.result["status"], ran.error) == (7, "failed", "memory.too_little")
    remedy = rows(ran)["train"]["need"]["remedy"]
    assert remedy["train.gradient_checkpointing"] == "true"
    taken = tuple(f"{name}={value}" for name, value in remedy.items())
    assert " ".join(f"--set {each}" for each in taken) in ran.stderr
    again = plan(project, sets=(*sets, *taken))
    assert again.code == 0, again.stderr
    assert rows(again)["train"]["need"]["peak_bytes"] <= 25e9


def test_full_disk_ends_the_plan(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.outlook.prospect.free_bytes", lambda _: 1000)
    ran = plan(project, sets=("train.steps=40",))
    assert (ran.code, ran.error) == (7, "disk.full")


def test_time_is_what_this_machine_took_and_else_unknown(project: Project) -> None:
    new = plan(project, sets=("encode_latents.dtype='bfloat16'",))
    assert rows(new)["encode-latents"]["seconds"] is None
    longer = rows(plan(project, sets=("train.steps=40", "preview.during_training=false")))["train"]
    lines = [json.loads(line) for line in (project.results / "metrics.jsonl").read_text().splitlines()]
    step = sum(line["seconds"] for line in lines[2:]) / 2
    assert longer["seconds"] == pytest.approx(36 * step)


def test_time_of_a_training_nobody_ran_is_taken_from_bench(untrained: Project) -> None:
    def row(**changes: object) -> dict[str, object]:
        same = {"model": "flux2-micro", "size_px": 64, "batch_size": 2, "quantize": "none", "compile": False}
        return {**same, "gradient_checkpointing": False, "milliseconds": 250.0, **changes}

    path = untrained.root / "bench.json"
    others = [row(size_px=16, milliseconds=1.0), row(batch_size=1), row(quantize="4bit"), row(size_px=512)]
    path.write_text(json.dumps({"device": "cpu", "measured": [*others, row()]}))
    sets = ("preview.during_training=false",)
    assert rows(plan(untrained, sets=sets))["train"]["seconds"] is None
    assert rows(plan(untrained, "--bench", str(path), sets=sets))["train"]["seconds"] == pytest.approx(4 * 0.25)
    path.write_text("[]")
    ran = plan(untrained, "--bench", str(path))
    assert (ran.code, ran.error) == (2, "plan.bench")


def test_setting_for_steps_that_are_never_taken_is_told_while_there_is_something_to_train(project: Project) -> None:
    late = ("train.validation.every=500", "train.validation.pictures=1")
    assert "the loss is measured once, before training, as train.steps is 4" in plan(project, sets=late).stderr
    project.make("train", "preview", sets=late)
    assert "as train.steps is 4" not in plan(project, sets=late).stderr


def test_dataset_that_validate_will_refuse_is_told(project: Project) -> None:
    (project.pictures / "bob.txt").unlink()
    (project.pictures / "ada.png").write_bytes(b"no picture")
    ran = plan(project)
    assert ran.stderr.count("validate will refuse: error[") == 2
    assert foreseen(ran)["validate"]["accepted"] == 2


def test_setting_of_no_model_is_refused_as_every_stage_would(project: Project) -> None:
    assert (ran := plan(project, sets=("model.source='nobody'",))).code == 2, ran.stderr
    shutil.rmtree(project.pictures)
    assert plan(project).code == 2


@pytest.mark.parametrize(
    ("model", "size_px", "quantize", "checkpointing", "gigabytes"), [row for row in MEASURED if row[2] == "none"][::3]
)
def test_peak_of_training_is_that_measured_on_a_gpu(
    project: Project, model: str, size_px: int, quantize: str, gigabytes: float, *, checkpointing: bool
) -> None:
    settings = [
        f'model.source="{VARIANTS[model].hub_id}"',
        f'model.quantize="{quantize}"',
        f"validate.resolutions=[{size_px}]",
        "validate.upscale=true",
        f"train={{rank=16, gradient_checkpointing={str(checkpointing).lower()}}}",
        "preview.prompts=[]",
    ]
    job = Job(
        load_config(project.config, settings), project.config, project.store, project.root / "runs", look_only=True
    )
    with TemporaryDirectory() as aside:
        ahead = look_ahead(job, Path(aside))
        need = Needs(job, ahead, Backend("cuda", mx.bfloat16), int(140e9)).of("train")
    assert need.peak_bytes == pytest.approx(gigabytes * 1e9, rel=0.15)
    assert need.fits


def test_run_shows_its_plan_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = new_project(tmp_path / "project")
    monkeypatch.chdir(project.root)
    before = listing(project.root)
    arguments = ("run", "pictures", "--model", "flux2-micro", "--trigger", "zorb", "--resolution", "32")
    ran = command(*arguments, "--max-steps", "6", "--validation-prompt", "a red one", "--plan", "--json")
    assert ran.code == 0, ran.stderr
    assert listing(project.root) == before
    assert foreseen(ran)["train"] == {"steps": 6, "resumed_from": 0}
    assert foreseen(ran)["encode-text"] == {"total": 6, "encoded": 6, "reused": 0}
