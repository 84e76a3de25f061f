"""verify FILE: a LoRA judged alone, and on a model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from stages.cli import run
from stages.stores.tensors import Tensor, load, save
from tests.stages.project import Project, flip, listing, truncate


def judged(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the object on stdout and the lines on stderr."""
    out, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = run(["verify", *map(str, arguments), "--json"])
    out.seek(0)
    return code, msgspec.json.decode(out.read()), errors.getvalue()


def on_its_model(project: Project) -> list[str | Path]:
    return [project.lora, "--config", project.config, "--store", project.store, "--runs", project.root / "runs"]


def changed(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = load(path)
    path.unlink()
    save(path, change(dict(file.tensors)), file.metadata)


def test_own_lora_says_all_about_itself(project: Project) -> None:
    code, result, page = judged(project.lora)
    about = result["about"]
    assert (code, result["error"], result["findings"]) == (0, None, [])
    assert about["producer"].startswith("flux2-lora ")
    assert (about["kind"], about["ranks"], about["modules"]) == ("LoRA", {"4": 24}, 24)
    assert about["fits"] == ["flux2-micro"]
    assert about["tensor_digest"] == about["tensor_digest_said"] == result["digest"]
    assert {verdict for verdict, _ in about["readers"].values()} == {"loads"}
    assert about["velocity"] is None
    assert "learning rate 0.001" in page
    assert "what it does to a model" in page
    assert "ComfyUI" in page
    assert len(page.splitlines()) < 20


def test_on_its_model_it_moves_the_velocity_a_little(project: Project) -> None:
    code, result, page = judged(*on_its_model(project))
    assert code == 0
    assert 1e-4 < result["about"]["velocity"] < 0.2
    assert "moves the velocity" in page


def test_judging_writes_nothing(project: Project) -> None:
    before = listing(project.root)
    assert judged(*on_its_model(project))[0] == 0
    assert listing(project.root) == before


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (flip, "lora.digest"),
        (truncate, "tensors.truncated"),
        (
            lambda path: changed(path, lambda all_: {k: Tensor(t.dtype, t.data * 0) for k, t in all_.items()}),
            "lora.zero",
        ),
        (
            lambda path: changed(
                path, lambda all_: {k: Tensor(t.dtype, np.full_like(t.data, 0x7FC0)) for k, t in all_.items()}
            ),
            "lora.not_finite",
        ),
        (lambda path: changed(path, lambda all_: dict(list(all_.items())[1:])), "lora.missing_half"),
        (lambda path: changed(path, lambda all_: {f"x.{k}": t for k, t in all_.items()}), "lora.unknown_key"),
    ],
)
def test_what_is_wrong_with_a_file_is_found_without_its_model(
    project: Project, harm: Callable[[Path], None], code: str
) -> None:
    harm(project.lora)
    exit_code, result, errors = judged(project.lora)
    found = [finding["code"] for finding in result.get("findings", [])]
    assert (exit_code, code in found) == (4, True)
    assert f"error[{code}]" in errors


def saying(path: Path, **metadata: str) -> None:
    file = load(path)
    path.unlink()
    save(path, file.tensors, {**file.metadata, **metadata})


def test_what_a_file_says_of_itself_is_shown_in_part_and_never_believed(project: Project) -> None:
    long, deep = "x" * (1 << 20), "[" * 100_000
    harm = {"comment": long, "step": "9" * 60_000, "config": f'{{"steps":{deep}', "lora_adapter_metadata": deep}
    saying(project.lora, **harm)
    code, result, page = judged(project.lora)
    assert (code, [finding["code"] for finding in result["findings"]]) == (4, ["lora.metadata"])
    assert "comment" not in result["about"]["says"]
    assert "lora_adapter_metadata" not in result["about"]["says"]
    assert any("3 entries of its metadata" in each for each in result["about"]["not_checked"])
    assert max(map(len, page.splitlines())) < 500
    saying(project.lora, lora_adapter_metadata="{}", software="flux2-lora \x1b[31m", step="\n\x1b[2J")
    assert "\x1b" not in judged(project.lora)[2]


def test_type_that_cannot_be_loaded_is_refused_by_the_file_s_name(project: Project) -> None:
    changed(project.lora, lambda all_: {k: Tensor("F64", t.data.astype(np.float64)) for k, t in all_.items()})
    code, result, _ = judged(project.lora)
    assert (code, result["error"]["code"]) == (4, "tensors.dtype")
    assert result["error"]["where"].startswith(f"{project.lora}: ")


def test_lora_of_another_model_is_refused_and_one_of_other_weights_is_told(own_model: Project) -> None:
    own_model.make("train", sets=("train.steps=1",))
    flip(own_model.root / "model" / "transformer" / "diffusion_pytorch_model.safetensors", 0.999)
    code, result, _ = judged(*on_its_model(own_model))
    assert (code, [finding["code"] for finding in result["findings"]]) == (0, ["lora.other_base"])


def test_model_that_is_not_here_is_said_not_to_be(project: Project) -> None:
    code, result, _ = judged(project.lora, "--model", "klein-base-4b")
    assert (code, result["error"]["code"]) == (7, "model.absent")


@pytest.mark.parametrize("arguments", [[], ["a.safetensors", "--model", "flux2-micro", "--config", "x.toml"]])
def test_neither_run_nor_file_and_two_models_are_usage_errors(arguments: list[str]) -> None:
    code, result, _ = judged(*arguments)
    assert (code, result["error"]["code"]) == (2, "usage")
