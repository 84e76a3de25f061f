"""Settings whose effect shows in what a stage leaves behind."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest
from PIL import Image

from schemas.train import Train
from stages.stores import tensors
from tests.stages.project import Project, rows
from tests.test_settings import SHOWN, UNKEYED

QUIET = "preview.during_training=false"


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_lora_is_saved_in_the_type_asked_for(untrained: Project, dtype: str, stored: str) -> None:
    untrained.make("train", sets=(QUIET, "train.steps=1", f"train.save_dtype={dtype}"))
    assert {tensor.dtype for tensor in tensors.load(untrained.lora).tensors.values()} == {stored}


def picture(project: Project, *sets: str) -> np.ndarray:
    """Return the picture of the model without LoRA."""
    project.make("preview", sets=sets)
    with Image.open(project.results / "preview_0.png") as image:
        return np.asarray(image)


@pytest.mark.parametrize("setting", ["preview.seed=43", "preview.steps=3", "preview.guidance=1.5"])
def test_every_setting_of_previews_draws_another_picture_of_the_same_lora(project: Project, setting: str) -> None:
    before, lora = picture(project), project.lora.read_bytes()
    after = picture(project, setting)
    assert before.shape == after.shape == (32, 32, 3)
    assert not np.array_equal(before, after)
    assert np.array_equal(picture(project), before)
    assert project.lora.read_bytes() == lora


def test_key_of_a_training_holds_every_setting_but_those_said_to_be_unkeyed(finished: Project) -> None:
    (manifest,) = (finished.store / "train").glob("*/manifest.json")
    keyed = set(msgspec.json.decode(manifest.read_bytes())["params"]) - {"seed"}
    of_train = {name: re.split(r"[.\[]", name)[1] for name in SHOWN if name.startswith("train.")}
    unkeyed = {of_train[name] for name in UNKEYED if name in of_train}
    # Fields added later are left out at their neutral value, as they are here.
    assert keyed | set(Train.NEUTRAL) | unkeyed == set(of_train.values())
    assert not keyed & unkeyed


def test_setting_in_no_key_leaves_a_training_up_to_date(project: Project) -> None:
    settings = [
        *("model.allow_distilled=true", "train.checkpoint_every=3", "train.rotation={keep_last = 1}", QUIET),
        *("preview.seed=43", "preview.size=48", "preview.steps=3", "preview.guidance=1.5"),
    ]
    before = project.lora.read_bytes()
    for setting in settings:
        ran = project.run("train", sets=(setting,))
        assert (ran.code, ran.status) == (0, "up to date"), setting
        assert project.lora.read_bytes() == before


def test_seed_of_validation_draws_another_noise_and_trains_the_same(untrained: Project) -> None:
    found = []
    for seed in (1, 2):
        validation = ('train.validation={names = ["ada.png"]}', f"train.validation.seed={seed}")
        assert untrained.run("train", "--force", sets=(QUIET, "train.steps=2", *validation)).code == 0
        first = (untrained.results / "metrics.jsonl").read_bytes().splitlines()[0]
        found.append((msgspec.json.decode(first)["validation_loss"], untrained.lora.read_bytes()))
    (one, trained), (other, again) = found
    assert one != other
    assert trained == again


def test_previews_have_the_size_asked_for(project: Project) -> None:
    assert picture(project, "preview.size=48").shape == (48, 48, 3)


def test_picture_above_the_limit_of_megapixels_is_rejected(untrained: Project) -> None:
    ran = untrained.run("validate", sets=("validate.max_megapixels=0.002",))  # 48 x 48 are 0.0023
    assert (ran.code, len(ran.result["findings"])) == (3, 4)
    assert untrained.run("validate", sets=("validate.max_megapixels=0.0024",)).code == 0


def test_empty_caption_is_rejected_unless_allowed(untrained: Project) -> None:
    (untrained.pictures / "ada.txt").write_text("")
    assert untrained.run("validate").code == 3
    ran = untrained.make("validate", sets=("validate.allow_empty_captions=true",))["validate"]
    assert "zorb" in {row["text"].strip() for row in rows(ran.folder / "captions.parquet")}


def test_picture_too_small_for_a_resolution_fills_it_only_by_upscaling(untrained: Project) -> None:
    def widths(*sets: str) -> set[int]:
        ran = untrained.make("validate", sets=("validate.resolutions=[64]", *sets))["validate"]
        return {row["bucket_width"] for row in rows(ran.folder / "dataset.parquet")}

    assert widths() == {48}
    assert widths("validate.upscale=true") == {64}


def test_background_shows_where_a_picture_is_transparent(untrained: Project) -> None:
    pixels = np.zeros((48, 48, 4), np.uint8)
    Image.fromarray(pixels).save(untrained.pictures / "ada.png")

    def encoded(*sets: str) -> int:
        return untrained.make("validate", "encode-latents", sets=sets)["encode-latents"].counts["encoded"]

    assert encoded() == 1
    assert encoded("validate.background=#ff0000") == 1
    assert encoded("validate.background=#ff0000") == 0


@pytest.mark.parametrize(
    ("part", "original", "stage"),
    [
        ("transformer", "transformer/diffusion_pytorch_model.safetensors", "train"),
        ("autoencoder", "vae/diffusion_pytorch_model.safetensors", "encode-latents"),
        ("text_encoder", "text_encoder/model.safetensors", "encode-text"),
        ("tokenizer", "tokenizer/tokenizer.json", "encode-text"),
    ],
)
def test_part_of_a_model_is_read_where_the_setting_says(
    own_model: Project, part: str, original: str, stage: str
) -> None:
    sets = (QUIET, "train.steps=1")
    expected = own_model.make(stage, sets=sets)[stage].result["digest"]
    source = own_model.root / "model" / original
    source.rename(own_model.root / f"elsewhere{source.suffix}")
    assert own_model.run(stage, sets=sets).code in (4, 7)
    # A single transformer file cannot say what it is.
    elsewhere = (*sets, f"model.{part}=elsewhere{source.suffix}", "model.variant=flux2-micro")
    ran = own_model.make(
        "validate", "encode-latents", "encode-text", *(["train"] if stage == "train" else []), sets=elsewhere
    )
    assert ran[stage].result["digest"] == expected
