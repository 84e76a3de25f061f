"""train: stopping and resuming without a trace, what counts as another training, and the LoRA file it leaves."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors import safe_open

from schemas.errors import Damaged
from stages.stores.tensors import load, tensor_digest
from stages.training.loop import Line
from stages.training.previews import Painter
from tests.stages.project import Project, contents, edit, flip, stop_after, truncate, undefined

# Every feature that draws: two pictures of two batches a step, dropped captions, mirrored twins.
SETTINGS = """
[encode_latents]
flip = true
[train]
steps = 8
batch_size = 2
gradient_accumulation = 2
learning_rate = 1e-3
rank = 4
alpha = 4.0
checkpoint_every = 3
caption_dropout = 0.3
"""
STEPS = 8


def trace(project: Project) -> tuple[str, str, list[Line]]:
    """What a training comes to: digests of LoRA and state at the end, metrics without time and memory."""
    [end] = (project.store / "checkpoints").glob(f"*/{STEPS}")
    lines = [msgspec.json.decode(line) for line in (project.results / "metrics.jsonl").read_bytes().splitlines()]
    kept = [{name: line[name] for name in ("step", "loss", "learning_rate", "grad_norm")} for line in lines]
    state = tensor_digest(load(end / "state.safetensors").tensors)
    return tensor_digest(load(project.lora).tensors), state, kept


def steps_saved(project: Project) -> list[int]:
    return sorted(int(path.name) for path in (project.store / "checkpoints").glob("*/*"))


@pytest.fixture(scope="module")
def ready(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Everything that training reads; only to be copied."""
    project = encoded.copy(tmp_path_factory.mktemp("ready") / "project")
    text = project.config.read_text()
    start, end = text.index("[train]"), text.index("[preview]")
    project.config.write_text(text[:start] + SETTINGS + text[end:].replace('["a red [trigger]"]', "[]"))
    project.make("validate", "encode-latents", "encode-text")
    return project


@pytest.fixture(scope="module")
def unbroken(ready: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A training from the first step to the last without a stop; only to be looked at or copied."""
    project = ready.copy(tmp_path_factory.mktemp("unbroken") / "project")
    project.make("train")
    return project


@pytest.fixture
def project(ready: Project, tmp_path: Path) -> Project:
    return ready.copy(tmp_path / "project")


@pytest.fixture
def done(unbroken: Project, tmp_path: Path) -> Project:
    return unbroken.copy(tmp_path / "done")


@pytest.mark.parametrize(
    ("number", "code", "after", "saved"),
    [(signal.SIGTERM, 143, 1, [2]), (signal.SIGINT, 130, 3, [3]), (signal.SIGTERM, 143, 4, [3, 5])],
)
def test_signal_leaves_a_checkpoint_that_resumes_without_a_trace(
    project: Project, unbroken: Project, number: signal.Signals, code: int, after: int, saved: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(after, number, patch)
        stopped = project.run("train")
    assert (stopped.code, stopped.error) == (code, "run.stopped")
    assert steps_saved(project) == saved
    # A checkpoint forced by a signal is for resuming only.
    shown = {path.name for path in project.results.glob("checkpoint_*")}
    assert shown == {f"checkpoint_{step}.safetensors" for step in saved if step % 3 == 0}
    resumed = project.make("train")["train"]
    assert resumed.counts == {"steps": STEPS, "resumed_from": saved[-1]}
    assert trace(project) == trace(unbroken)


def test_remedy_for_damage_in_the_store_repeats_the_command_line(project: Project) -> None:
    for fragment in (project.store / "fragments" / "latents").glob("*/c.0.0.0.0"):
        truncate(fragment)
    ran = project.run("train", sets=("train.steps=1",))
    places = f"--config {project.config} --set train.steps=1 --store {project.store} --runs {project.root / 'runs'}"
    fix = f"flux2-lora encode-latents {places} --force"
    assert (ran.code, ran.result["error"]["fix"]) == (4, fix)
    assert ran.stderr.endswith(f"fix: {fix}\n")


def test_warm_up_longer_than_the_training_is_said_and_trained(project: Project) -> None:
    ran = project.run("train", sets=("train.steps=1", "train.schedule.warmup_steps=4"))
    assert (ran.code, ran.stderr.count("warning")) == (0, 1)
    assert "warmup_steps is 4: the rate ends at 25 %" in ran.stderr


def test_stop_is_saved_though_nobody_hears_of_it_any_more(project: Project) -> None:
    """Ctrl-C ends the `tee` of `train 2>&1 | tee log` as well, and a terminal that is closed takes no line."""
    settings = ("train.steps=1000", "train.checkpoint_every=1000")
    command = project.arguments("train", *(part for each in settings for part in ("--set", each)))
    environment = {**os.environ, "FLUX2_LORA_EVENTS": "1"}
    line = [sys.executable, "-m", "stages", *command]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        for told in process.stderr:
            if msgspec.json.decode(told).get("done", 0) >= 2:
                break
        process.stderr.close()
        # Some lines are lost before it is asked to stop.
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        [said] = process.stdout.read().splitlines()
    assert (process.returncode, msgspec.json.decode(said)["error"]["code"]) == (130, "run.stopped")
    [step] = steps_saved(project)
    assert step > 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_or_killed_process_resumes_without_a_trace(
    project: Project, unbroken: Project, number: signal.Signals, code: int
) -> None:
    # The same trajectory with more steps than are waited for: it never ends before it is stopped.
    command = [sys.executable, "-m", "stages", *project.arguments("train", "--set", "train.steps=1000")]
    environment = {**os.environ, "FLUX2_LORA_EVENTS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if msgspec.json.decode(line).get("done", 0) >= 4:
                break
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode == code
    resumed = project.make("train")["train"]
    assert resumed.counts["resumed_from"] >= 3
    assert trace(project) == trace(unbroken)
    assert not any((project.store / ".tmp").iterdir())


def test_more_steps_continue_and_fewer_steps_go_back(project: Project, done: Project, unbroken: Project) -> None:
    project.make("train", sets=("train.steps=5",))
    five = tensor_digest(load(project.lora).tensors)
    resumed = project.make("train")["train"]
    assert resumed.counts == {"steps": 8, "resumed_from": 5}
    assert trace(project) == trace(unbroken)
    fewer = done.make("train", sets=("train.steps=5",))["train"]
    assert fewer.counts == {"steps": 5, "resumed_from": 3}
    assert tensor_digest(load(done.lora).tensors) == five


def test_checkpoints_and_previews_leave_no_mark_on_the_lora(project: Project, unbroken: Project) -> None:
    sets = ("train.checkpoint_every=1", 'preview.prompts=["a red thing"]')
    project.make("encode-text", "train", sets=sets)
    assert steps_saved(project) == list(range(1, STEPS + 1))
    assert (project.results / "preview_5.png").is_file()
    assert trace(project) == trace(unbroken)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Damaged("record.changed", "an embedding is damaged", where="fragment"), "record.changed"),
        (RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes."), "memory.full"),
    ],
)
def test_pictures_that_cannot_be_drawn_end_no_training(
    project: Project, unbroken: Project, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    """Before the first step they do: nothing is lost yet, and whoever started it still looks."""
    paint, failing = Painter.paint, [True, False]

    def failed(painter: Painter, lora: Path | None, *more: Any, **named: Any) -> int:
        if failing[lora is not None]:
            raise error
        return paint(painter, lora, *more, **named)

    sets = ('preview.prompts=["a red thing"]',)
    project.make("encode-text", sets=sets)
    monkeypatch.setattr(Painter, "paint", failed)
    assert project.run("train", sets=sets).error == code
    assert steps_saved(project) == []
    failing[:] = [False, True]
    ran = project.make("train", sets=sets)["train"]
    assert [f"no pictures of step {step}, training goes on" in ran.stderr for step in (3, 6, 8)] == [True] * 3
    assert trace(project) == trace(unbroken)
    monkeypatch.undo()
    assert project.make("preview", sets=sets)["preview"].counts == {"images": 4, "rendered": 3, "reused": 1}


def test_changed_setting_is_announced_and_starts_over(done: Project) -> None:
    sets = ("train.learning_rate=2e-3", "train.steps=2")
    refused = done.run("train", "--resume-only", sets=sets)
    assert (refused.code, refused.error) == (5, "train.new_trajectory")
    assert "learning_rate: 0.001 -> 0.002" in refused.result["error"]["where"]
    ran = done.run("train", sets=sets)
    assert ran.counts == {"steps": 2, "resumed_from": 0}
    assert "learning_rate: 0.001 -> 0.002" in ran.stderr
    assert "steps:" not in ran.stderr
    # The old training is untouched, and going back to it is announced as well.
    assert done.run("train").status == "up to date"
    assert "learning_rate: 0.001 -> 0.002" in done.run("train", "--force", sets=sets).stderr


def test_more_steps_of_a_schedule_that_looks_at_them_are_another_training_and_say_so(project: Project) -> None:
    cosine = ("train.schedule.kind=cosine", "train.steps=2")
    project.make("train", sets=cosine)
    more = (*cosine[:1], "train.steps=3")
    refused = project.run("train", "--resume-only", sets=more)
    assert (refused.code, refused.error) == (5, "train.new_trajectory")
    assert refused.result["error"]["where"].endswith("steps: 2 -> 3")
    ran = project.run("train", sets=more)
    assert ran.counts == {"steps": 3, "resumed_from": 0}
    assert "settings changed: a new trajectory, the old one keeps its checkpoints\n  steps: 2 -> 3\n" in ran.stderr


def lose_the_artifact(project: Project) -> list[Path]:
    """Leave of a finished training only its checkpoints; return them, oldest first."""
    shutil.rmtree(project.store / "train")
    return sorted((project.store / "checkpoints").glob("*/*"), key=lambda path: int(path.name))


def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(done: Project, unbroken: Project) -> None:
    newest = lose_the_artifact(done)[-1]
    flip(newest / "state.safetensors")
    ran = done.run("train")
    assert ran.counts == {"steps": STEPS, "resumed_from": 6}
    assert re.search(r"warning: error\[checkpoint\.\w+\].*falling back", ran.stderr)
    assert trace(done) == trace(unbroken)


def test_only_damaged_checkpoints_are_never_silently_replaced_by_a_fresh_start(done: Project) -> None:
    for folder in lose_the_artifact(done):
        truncate(folder / "state.safetensors")
    refused = done.run("train")
    assert (refused.code, refused.error) == (4, "checkpoint.damaged")
    assert done.run("train", "--force", sets=("train.steps=3",)).counts == {"steps": 3, "resumed_from": 0}


def test_finished_training_survives_the_loss_of_its_checkpoints(done: Project) -> None:
    lora = done.lora.read_bytes()
    folders = sorted((done.store / "checkpoints").glob("*/*"))
    flip(folders[0] / "lora.safetensors")
    (folders[1] / "lora.safetensors").unlink()
    kept = {path.name: path.read_bytes() for path in done.results.glob("checkpoint_*")}
    ran = done.run("train")
    assert (ran.code, ran.status) == (0, "up to date")
    assert ran.stderr.count("warning: error[file.changed]") == 2
    assert {path.name: path.read_bytes() for path in done.results.glob("checkpoint_*")} == kept
    shutil.rmtree(done.store / "checkpoints")
    done.lora.unlink()
    assert done.run("train").status == "up to date"
    assert done.lora.read_bytes() == lora


def test_damaged_artifact_never_overwrites_a_whole_result(done: Project) -> None:
    lora = done.lora.read_bytes()
    [folder] = (done.store / "train").iterdir()
    flip(folder / "lora.safetensors")
    refused = done.run("preview")
    assert (refused.code, refused.error) == (4, "file.changed")
    assert done.lora.read_bytes() == lora
    healed = done.run("train")
    assert (healed.code, healed.status, healed.counts["resumed_from"]) == (0, "built", 8)
    assert (folder / "lora.safetensors").read_bytes() == done.lora.read_bytes() == lora


def test_lora_file_is_what_others_load_and_says_how_it_was_made(unbroken: Project) -> None:
    with safe_open(unbroken.lora, "numpy") as file:
        names, metadata = list(file.keys()), file.metadata()
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    assert all(re.fullmatch(r"diffusion_model\..*\.lora_[AB]\.weight", name) for name in names)
    assert shapes["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"][0] == 4
    assert metadata["format"] == "pt"
    assert metadata["lora_rank"] == metadata["lora_alpha"] == "4"
    assert metadata["step"] == "8"
    assert metadata["base_model"] == "flux2-micro"
    assert metadata["software"].startswith("flux2-lora ")
    assert msgspec.json.decode(metadata["config"])["learning_rate"] == 1e-3
    for name in ("base_model_digest", "dataset_digest", "trajectory"):
        assert re.fullmatch("[0-9a-f]{64}", metadata[name])


def test_lora_file_holds_no_path_and_no_person(unbroken: Project) -> None:
    with safe_open(unbroken.lora, "numpy") as file:
        text = str(file.metadata())
    assert str(unbroken.root) not in text
    assert str(Path.home()) not in text
    # A user's name may be a part of a hexadecimal digest or of a word; alone it may not stand anywhere.
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)
    assert not re.search(r"\b(ada|pictures|zorb)\b", text)


def test_checkpoint_files_are_loras_of_their_steps(unbroken: Project) -> None:
    files = {path.name: load(path) for path in unbroken.results.glob("*.safetensors")}
    assert set(files) == {"cat.safetensors", *(f"checkpoint_{step}.safetensors" for step in (3, 6, 8))}
    assert files["cat.safetensors"].sha256 == files["checkpoint_8.safetensors"].sha256
    assert files["checkpoint_3.safetensors"].metadata["step"] == "3"


def test_training_needs_the_stages_before_it(project: Project) -> None:
    shutil.rmtree(project.store / "encode-text")
    assert (project.run("train").code, project.run("train").error) == (5, "input.stale")
    shutil.rmtree(project.root / "runs")
    shutil.rmtree(project.store / "encode-latents")
    refused = project.run("train")
    assert (refused.code, refused.error) == (5, "input.missing")
    assert refused.result["error"]["fix"].startswith("flux2-lora encode-latents --config ")


def test_settings_that_are_refused_are_no_training_begun(done: Project) -> None:
    before = contents(done.results)
    refused = done.run("train", sets=("train.targets=['nothing.*']",))
    assert (refused.code, refused.error) == (2, "train.no_such_target")
    refused = done.run("train", sets=("train.timesteps.minimum=0.99999",))
    assert (refused.code, refused.error) == (2, "timesteps.empty_window")
    assert (done.root / "nowhere.safetensors").write_bytes(done.lora.read_bytes()) > 0
    other = ("train.init_lora=nowhere.safetensors", "train.rank=2")
    assert (done.run("train", sets=other).error, contents(done.results)) == ("train.init_lora_rank", before)


def test_all_targets_train(project: Project) -> None:
    assert project.make("train", sets=("train.targets=all", "train.steps=1"))["train"].counts["steps"] == 1


def test_training_that_learns_nothing_ends_in_an_error(project: Project) -> None:
    # Below the smallest float32.
    ran = project.run("train", sets=("train.learning_rate=1e-60", "train.steps=1"))
    assert (ran.code, ran.error) == (8, "train.no_progress")
    assert not project.lora.exists()


def test_training_without_a_finite_step_ends_in_an_error_however_often_it_is_run(own_model: Project) -> None:
    """Steps in a row are counted across a stop: else each run would take two more, and the last succeed."""
    path = own_model.root / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    undefined(path, "x_embedder.weight")
    sets = ("preview.during_training=false",)
    for _ in range(2):
        ran = own_model.run("train", sets=sets)
        assert (ran.code, ran.error) == (8, "train.not_finite")
        assert "last step 3" in ran.result["error"]["what"]
        assert "a lower rate cannot help" in ran.result["error"]["fix"]
        assert ran.result["error"]["fix"].endswith(f" --runs {own_model.root / 'runs'} --deep")
    assert steps_saved(own_model) == [2]
    # Too few for three in a row.
    ran = own_model.run("train", "--force", sets=(*sets, "train.steps=2"))
    assert (ran.code, ran.error) == (8, "train.no_progress")
    assert not own_model.lora.exists()


def test_distilled_model_is_refused_unless_allowed(own_model: Project) -> None:
    edit(own_model.root / "model" / "model_index.json", '"is_distilled": false', '"is_distilled": true')
    refused = own_model.run("train")
    assert (refused.code, refused.error) == (2, "model.distilled")
    assert own_model.run("train", sets=("model.allow_distilled=true", "train.steps=1")).code == 0


def test_damaged_transformer_is_refused_before_training(own_model: Project) -> None:
    path = own_model.root / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    truncate(path)
    assert own_model.run("train").code == 4


def test_transformer_of_another_architecture_is_refused(own_model: Project) -> None:
    path = own_model.root / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(own_model.root / "model" / "vae" / path.name, path)
    refused = own_model.run("train")
    assert refused.code == 4
    assert str(path) in refused.result["error"]["where"]
