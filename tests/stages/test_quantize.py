"""Quantized weights through whole runs: trained on, drawn with, resumed, verified, and kept packed in a store."""

from __future__ import annotations

import json
import signal
from typing import get_args

import pytest

from schemas.quantize import Quantize
from stages.flux2.packing import FORMATS
from tests.stages.project import Project, contents, flip, stop_after

CHAIN = ("train", "preview")
FORMATS_IN_FULL = ("8bit", "4bit", "nvfp4")


def metadata(project: Project) -> dict[str, str]:
    data = project.lora.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("quantize", FORMATS_IN_FULL)
def test_every_format_trains_draws_and_verifies(untrained: Project, quantize: Quantize) -> None:
    sets = (f"model.quantize={quantize}",)
    plain = untrained.make(*CHAIN)
    assert metadata(untrained)["base_quantization"] == "none"
    ran = untrained.make(*CHAIN, sets=sets)
    assert metadata(untrained)["base_quantization"] == quantize
    for stage in CHAIN:
        assert ran[stage].status == "built"
        assert ran[stage].result["digest"] != plain[stage].result["digest"]
    manifest = json.loads((ran["train"].folder / "manifest.json").read_text())
    assert manifest["params"]["quantize"] == quantize
    assert untrained.run("verify", sets=sets).counts["errors"] == 0
    again = untrained.make(*CHAIN, sets=sets)
    assert {each.status for each in again.values()} == {"up to date"}
    # And back: what was made without is still there.
    assert {each.status for each in untrained.make(*CHAIN).values()} == {"up to date"}


def test_no_format_leaves_keys_as_they_were(finished: Project) -> None:
    for stage in CHAIN:
        receipt = json.loads((finished.results / f"{stage}.json").read_text())
        manifest = json.loads((finished.store / stage / receipt["key"] / "manifest.json").read_text())
        assert "quantize" not in manifest["params"]


@pytest.mark.parametrize("quantize", ["mxfp8", "mxfp4"])
def test_every_other_format_trains(untrained: Project, quantize: Quantize) -> None:
    assert set(get_args(Quantize)) == {"none", *FORMATS_IN_FULL, "mxfp8", "mxfp4"}
    untrained.make("train", sets=(f"model.quantize={quantize}", "train.steps=1", "preview.during_training=false"))
    assert metadata(untrained)["base_quantization"] == quantize


def test_stopped_training_on_quantized_weights_ends_with_the_same_bits(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("model.quantize=4bit", "train.gradient_checkpointing=true")
    whole = untrained.copy(untrained.root.parent / "whole")
    whole.make("train", sets=sets)
    with monkeypatch.context() as patch:
        stop_after(1, signal.SIGTERM, patch)
        assert untrained.run("train", sets=sets).code == 128 + signal.SIGTERM
    resumed = untrained.make("train", sets=sets)["train"]
    assert 0 < resumed.counts["resumed_from"] < 4
    assert untrained.lora.read_bytes() == whole.lora.read_bytes()


def test_every_format_of_the_text_encoder_is_an_embedding_of_its_own(untrained: Project) -> None:
    found = {
        mode: untrained.make("encode-text", sets=(f"encode_text.quantize={mode}",))["encode-text"]
        for mode in get_args(Quantize)
    }
    assert found.pop("none").counts["encoded"] == 0
    assert {each.counts["reused"] for each in found.values()} == {0}
    assert len({each.result["digest"] for each in found.values()}) == len(FORMATS)


@pytest.mark.parametrize(("stage", "setting"), [("encode-text", "encode_text"), ("train", "model")])
def test_stage_that_cannot_fit_names_the_format_that_would(
    untrained: Project, stage: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"encode-text": 3e6, "train": 21e6}[stage]
    for module in ("memory", "preflight"):
        monkeypatch.setattr(f"stages.training.{module}.device_bytes", lambda _: int(limit))
    sets = ("encode_text.dtype=float32", "train.gradient_checkpointing=true", "train.batch_size=1")
    if stage == "train":
        sets = sets[1:]
    ran = untrained.run(stage, sets=sets)
    assert (ran.code, ran.error) == (7, "memory.too_little")
    assert f'set {setting}.quantize = "8bit"' in ran.stderr
    assert untrained.run(stage, sets=(*sets, f"{setting}.quantize=8bit")).code == 0


def test_packed_weights_in_a_store_give_the_same_bits_and_need_no_packing(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("model.quantize=4bit", "encode_text.quantize=8bit")
    plain = untrained.copy(untrained.root.parent / "plain")
    expected = plain.make("encode-text", *CHAIN, sets=sets)
    ran = untrained.run("quantize", sets=sets)
    assert (ran.code, ran.status, ran.counts) == (0, "built", {"quantized": 2, "reused": 0})
    assert untrained.run("quantize", sets=sets).counts == {"quantized": 0, "reused": 2}

    def refuse(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("stages.flux2.quantize.packed", refuse)
    found = untrained.make("encode-text", *CHAIN, sets=sets)
    for stage, each in found.items():
        assert each.result["digest"] == expected[stage].result["digest"]
        assert each.result["key"] == expected[stage].result["key"]


def test_packed_weights_are_shared_by_runs_and_read_from_other_stores(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("model.quantize=8bit",)
    other = untrained.copy(untrained.root.parent / "other")
    other.make("quantize", sets=sets)
    before = contents(other.store / "quantized-transformer")
    monkeypatch.setattr("stages.flux2.quantize.packed", None)
    ran = untrained.run("train", "--also", str(other.store), sets=sets)
    assert ran.code == 0
    assert contents(other.store / "quantized-transformer") == before


def test_packed_weights_whose_bytes_changed_are_refused(untrained: Project) -> None:
    sets = ("model.quantize=8bit",)
    untrained.make("quantize", sets=sets)
    (file,) = (untrained.store / "quantized-transformer").glob("*/model.safetensors")
    flip(file)
    ran = untrained.run("train", sets=sets)
    assert (ran.code, ran.error) == (4, "quantize.altered")
    assert "flux2-lora quantize --config" in ran.stderr


def test_packed_file_is_a_transformer_by_itself(untrained: Project) -> None:
    untrained.make("quantize", sets=("model.quantize=4bit",))
    (file,) = (untrained.store / "quantized-transformer").glob("*/model.safetensors")
    single = (f"model.transformer={file}", "model.variant=flux2-micro")
    untrained.make("train", sets=single)
    assert metadata(untrained)["base_quantization"] == "4bit"
    untrained.make("train", sets=(*single, "model.quantize=4bit", "train.steps=1"))
    ran = untrained.run("train", sets=(*single, "model.quantize=8bit"))
    assert (ran.code, ran.error) == (2, "model.quantized_already")
    assert 'set model.quantize = "none"' in ran.stderr


def test_nothing_to_quantize_is_said(untrained: Project) -> None:
    ran = untrained.run("quantize")
    assert (ran.code, ran.error) == (2, "quantize.nothing")
    assert set(FORMATS) == set(get_args(Quantize)) - {"none"}
