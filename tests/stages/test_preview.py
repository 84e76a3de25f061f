"""preview: which pictures there are, that each is drawn once, and that no damage is shown or kept."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.errors import Damaged
from stages.contract.artifacts import read_manifest
from stages.stores.tensors import Tensor, load, save
from stages.training import previews
from stages.training.recorder import Recorder
from tests.stages.project import Project, contents, edit, flip, listing, truncate

TWO_PROMPTS = 'preview.prompts=["a red zorb", "a blue zorb"]'


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def stored(project: Project) -> list[Path]:
    return sorted((project.store / "fragments" / "previews").glob("*.png"))


def test_one_prompt_gives_a_picture_a_step_and_the_latest(finished: Project) -> None:
    shown = {path.name for path in finished.results.glob("*.png")}
    singles = {"preview_0.png", "preview_2.png", "preview_4.png", "preview_latest.png"}
    assert shown == singles | {"previews.png", "training_curves.png"}
    latest, last = (finished.results / name for name in ("preview_latest.png", "preview_4.png"))
    assert latest.read_bytes() == last.read_bytes()
    assert pixels(last).shape == (32, 32, 3)


def test_training_that_is_asked_to_stop_draws_no_further_and_preview_fills_in(
    untrained: Project, finished: Project
) -> None:
    sets = ("preview.steps=20",)
    go_on, drawn = Recorder._go_on, list[int]()

    def stopped_at_5(recorder: Recorder, step: int) -> None:
        drawn.append(step)
        if recorder.last is not None and step == 5:
            signal.raise_signal(signal.SIGTERM)
        go_on(recorder, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_go_on", stopped_at_5)
        ran = untrained.run("train", sets=sets)
    assert (ran.code, ran.error) == (143, "run.stopped")
    # All of the model without a LoRA, and five of the first checkpoint's.
    assert drawn == [*range(1, 21), *range(1, 6)]
    assert [path.name for path in (untrained.store / "checkpoints").glob("*/*")] == ["2"]
    made = untrained.make("train", "preview", sets=sets)
    assert made["train"].counts["resumed_from"] == 2
    assert made["preview"].counts == {"images": 3, "rendered": 1, "reused": 2}
    assert untrained.lora.read_bytes() == finished.lora.read_bytes()


def test_lora_shows_in_the_pictures(finished: Project) -> None:
    steps = [pixels(finished.results / f"preview_{step}.png") for step in (0, 2, 4)]
    assert not np.array_equal(steps[0], steps[1])
    assert not np.array_equal(steps[1], steps[2])


def test_several_prompts_give_single_pictures_and_a_grid(project: Project) -> None:
    project.make("encode-text", "train", "preview", sets=(TWO_PROMPTS,))
    for step in (0, 2, 4):
        first, second = (pixels(project.results / f"preview_{step}_{number}.png") for number in (1, 2))
        assert first.shape == second.shape == (32, 32, 3)
        assert pixels(project.results / f"preview_{step}.png").shape[1] > 64
    grids = [(project.results / name).read_bytes() for name in ("preview_latest.png", "preview_4.png")]
    assert grids[0] == grids[1]


def test_contact_sheet_has_a_row_a_prompt_and_a_column_a_step(project: Project) -> None:
    one = pixels(project.results / "previews.png").shape
    project.make("encode-text", "train", "preview", sets=(TWO_PROMPTS, "train.checkpoint_every=1", "train.rank=2"))
    five = pixels(project.results / "previews.png").shape
    assert five[1] - 12 == 5 * (one[1] - 12) / 3
    assert five[0] == 2 * one[0]


def test_training_shows_the_same_contact_sheet_as_it_grows(untrained: Project, finished: Project) -> None:
    untrained.make("train", sets=("train.steps=2",))
    two = pixels(untrained.results / "previews.png")
    # Resumed: the steps before are on it too.
    untrained.make("train")
    whole = (untrained.results / "previews.png").read_bytes()
    assert whole == (finished.results / "previews.png").read_bytes()
    assert two.shape[1] < pixels(untrained.results / "previews.png").shape[1]


def test_checkpoint_that_cannot_be_read_is_an_error_and_never_left_out_unsaid(project: Project) -> None:
    [folder] = (project.store / "checkpoints").glob("*/2")
    [last] = (project.store / "checkpoints").glob("*/4")
    # Of the last step there is the finished LoRA.
    flip(last / "manifest.json")
    assert project.run("preview", sets=("preview.steps=1",)).counts["images"] == 3
    flip(folder / "manifest.json")
    ran = project.run("preview", sets=("preview.steps=3",))
    assert (ran.code, ran.result["error"]["where"].partition(":")[0]) == (4, str(folder / "manifest.json"))
    # Training is complete without it, and says so.
    ran = project.run("train")
    assert (ran.code, ran.stderr.count("warning: error[checkpoint.")) == (0, 2)
    shutil.rmtree(folder)
    assert project.run("preview", sets=("preview.steps=3",)).counts["images"] == 2


def test_pictures_are_the_same_whether_training_drew_them_or_not(untrained: Project, finished: Project) -> None:
    without = ("preview.during_training=false",)
    untrained.make("train", sets=without)
    assert not list(untrained.results.glob("preview_*.png"))
    assert untrained.make("preview", sets=without)["preview"].counts == {"images": 3, "rendered": 3, "reused": 0}
    shown, expected = contents(untrained.results), contents(finished.results)
    for name in ("preview_0.png", "preview_2.png", "preview_4.png", "preview_latest.png"):
        assert shown[name] == expected[name]


def distilled(project: Project) -> None:
    """Put a distilled sibling of model/ into sibling/: the same shape, other weights."""
    shutil.copytree(project.root / "model", project.root / "sibling")
    edit(project.root / "sibling" / "model_index.json", '"is_distilled": false', '"is_distilled": true')
    path = project.root / "sibling" / "transformer" / "diffusion_pytorch_model.safetensors"
    file = load(path)
    name = next(iter(file.tensors))
    weights = {**file.tensors, name: Tensor(file.tensors[name].dtype, file.tensors[name].data[::-1].copy())}
    path.unlink()
    save(path, weights, file.metadata)


def test_distilled_sibling_draws_in_four_steps_without_guidance_after_training(own_model: Project) -> None:
    distilled(own_model)
    edit(own_model.config, "\nsteps = 2\n", "\n")
    sibling = 'preview.distilled="sibling"'
    own_model.make("train", sets=(sibling,))
    assert not list(own_model.results.glob("preview*.png"))
    ran = own_model.make("preview", sets=(sibling,))["preview"]
    assert ran.counts == {"images": 3, "rendered": 3, "reused": 0}
    params = read_manifest(ran.folder).params
    assert (params["steps"], params["guidance"], params["distilled"]) == (4, 1.0, True)
    shown = [(own_model.results / f"preview_{step}.png").read_bytes() for step in (0, 2, 4)]
    assert len(set(shown)) == 3
    # Wherever it lies, it is the same model; and the base draws other pictures of the same LoRA.
    (own_model.root / "sibling").rename(own_model.root / "moved")
    assert own_model.run("preview", sets=('preview.distilled="moved"',)).status == "up to date"
    base = ("preview.steps=4", "preview.guidance=1.0")
    assert own_model.make("preview", sets=base)["preview"].counts["rendered"] == 3
    assert own_model.run("verify", sets=base).code == 0


def test_model_that_is_no_distilled_sibling_is_refused(own_model: Project) -> None:
    own_model.make("train", sets=("preview.during_training=false", "train.steps=1"))
    sets = ("train.steps=1", 'preview.distilled="model"')
    refused = own_model.run("preview", sets=sets)
    assert (refused.code, refused.error) == (2, "preview.not_a_sibling")


@pytest.mark.parametrize(
    ("source", "code", "error"),
    [
        ("file.safetensors", 2, "model.source"),
        ("nowhere", 2, "model.unknown"),
        ("../nowhere", 7, "model.absent"),
        ("pictures", 4, "model.missing"),
    ],
)
def test_what_is_wrong_with_the_sibling_is_said_of_it_and_not_of_the_model(
    project: Project, source: str, code: int, error: str
) -> None:
    (project.root / "file.safetensors").touch()
    refused = project.run("preview", sets=(f'preview.distilled="{source}"',))
    assert (refused.code, refused.error) == (code, error)
    assert "fix: name a folder in the layout of diffusers" in refused.stderr
    assert "model.source" not in refused.stderr.replace("error[model.source]", "")


def test_same_prompt_twice_is_drawn_once(project: Project) -> None:
    sets = ('preview.prompts=["a red zorb", "a red zorb"]', "preview.size=48")
    ran = project.make("encode-text", "preview", sets=sets)["preview"]
    assert ran.counts == {"images": 6, "rendered": 3, "reused": 3}
    assert len(stored(project)) == 6


def test_no_prompts_give_no_pictures(untrained: Project) -> None:
    sets = ("preview.prompts=[]", "train.steps=1")
    ran = untrained.make("encode-text", "train", "preview", sets=sets)["preview"]
    assert ran.counts == {"images": 0, "rendered": 0, "reused": 0}
    assert not list(untrained.results.glob("preview_*.png"))


@pytest.mark.parametrize("harm", [Path.unlink, truncate])
def test_lost_or_short_picture_is_drawn_again_alone(project: Project, harm: object) -> None:
    path = stored(project)[0]
    before = path.read_bytes()
    harm(path)
    ran = project.make("preview")["preview"]
    assert ran.counts == {"images": 3, "rendered": 1, "reused": 2}
    assert path.read_bytes() == before


def test_damaged_picture_is_not_shown_until_drawn_again(project: Project) -> None:
    path, shown = stored(project)[0], contents(project.results)
    before = path.read_bytes()
    flip(path)
    ran = project.run("preview")
    assert (ran.status, ran.counts["rendered"]) == ("built", 1)
    assert "making" in ran.stderr
    assert contents(project.results) == shown
    assert path.read_bytes() == before


def test_damaged_lora_draws_nothing(project: Project) -> None:
    before = stored(project)
    [folder] = (project.store / "train").iterdir()
    flip(folder / "lora.safetensors", 0.9)
    refused = project.run("preview", sets=("preview.size=48",))
    assert (refused.code, refused.error) == (4, "file.changed")
    # What was drawn of the other steps may stay: it is right.
    assert set(before) <= set(stored(project))
    assert len(stored(project)) <= len(before) + 2


def test_pictures_of_the_finished_lora_outlive_its_checkpoints(project: Project) -> None:
    shutil.rmtree(project.store / "checkpoints")
    ran = project.run("preview", sets=("preview.size=48",))
    assert ran.counts == {"images": 2, "rendered": 2, "reused": 0}


def test_preview_before_training_names_the_stage_that_is_missing(untrained: Project) -> None:
    before = listing(untrained.store, "lookup")
    refused = untrained.run("preview")
    assert (refused.code, refused.error) == (5, "input.missing")
    assert refused.result["error"]["fix"].startswith("flux2-lora train ")
    assert listing(untrained.store, "lookup") == before


def test_picture_that_cannot_be_read_while_training_is_damage_not_a_bug(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 'preview.prompts=["a red one"]'
    untrained.make("encode-text", sets=(one,))
    with monkeypatch.context() as patch:
        patch.setattr(previews, "find_picture", lambda *_: None)
        refused = untrained.run("train", sets=(one,))
    assert (refused.code, refused.error) == (4, "preview.unreadable")
    untrained.make("train", sets=(one,))


def test_picture_that_is_cut_off_between_two_looks_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(Damaged, match="gone or damaged"):
        previews.pixels(path)
