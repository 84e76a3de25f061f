"""ema: the average of a training's checkpoints as a LoRA file, and nothing else touched."""

from __future__ import annotations

import signal
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from stages.flux2.variants import MICRO
from stages.lora.formats.read import read
from stages.stores.tensors import load, tensor_digest, to_mlx
from tests.stages.project import Project, Ran, flip, listing, stop_after

# alpha is not the rank: the scale has to reach the file.
SETS = (
    "train.alpha=8",
    "train.steps=6",
    "train.caption_dropout=0.05",
    "train.save_dtype=float32",
    "preview.during_training=false",
)
SCALE = 2.0
FLAT = 0.28


@pytest.fixture(scope="module")
def trained(encoded: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A training with checkpoints of steps 2, 4 and 6; only to be looked at or copied."""
    project = encoded.copy(tmp_path_factory.mktemp("trained") / "project")
    project.make("train", sets=SETS)
    return project


def average(project: Project, *more: str, sets: tuple[str, ...] = SETS) -> Ran:
    return project.run("ema", "--output", str(project.root / "out.safetensors"), *more, sets=sets)


def states(project: Project) -> dict[int, dict[str, np.ndarray]]:
    """Return the saved factors of every checkpoint by step."""
    folders = (project.store / "checkpoints").glob("*/*")
    return {
        int(folder.name): {
            name.removeprefix("lora."): tensor.data
            for name, tensor in load(folder / "state.safetensors").tensors.items()
            if name.startswith("lora.")
        }
        for folder in folders
    }


def gamma(sigma_rel: float) -> float:
    """Find by bisection the exponent whose profile t^gamma is that wide."""
    low, high = 0.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5) > sigma_rel
        low, high = (middle, high) if wide else (low, middle)
    return low


@pytest.mark.parametrize("sigma_rel", [0.1, FLAT])
def test_file_is_the_weighted_average_of_the_saved_factors(trained: Project, sigma_rel: float) -> None:
    ran = average(trained, "--sigma-rel", str(sigma_rel))
    assert (ran.code, ran.status, ran.counts) == (0, "built", {"checkpoints": 3})
    file = load(trained.root / "out.safetensors")
    assert ran.result["digest"] == tensor_digest(file.tensors)
    power, saved = gamma(sigma_rel) + 1, states(trained)
    shares = {step: (step / 6) ** power - ((step - 2) / 6) ** power for step in saved}
    assert sum(shares.values()) == pytest.approx(1)
    read_back = read({name: to_mlx(t) for name, t in file.tensors.items()}, file.metadata, MICRO.transformer)
    assert read_back.keys() == saved[6].keys()
    for name, factor in read_back.items():
        scale = SCALE if name.endswith("lora_B") else 1.0
        expected = scale * sum(shares[step] * saved[step][name].astype(np.float64) for step in saved)
        np.testing.assert_allclose(np.array(factor), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_file_says_how_it_was_made_and_is_of_the_usual_format(trained: Project) -> None:
    average(trained)
    found, usual = load(trained.root / "out.safetensors"), load(trained.lora)
    assert {name: each.shape for name, each in found.tensors.items()} == {
        name: each.shape for name, each in usual.tensors.items()
    }
    how = found.metadata.pop("post_hoc_ema")
    assert msgspec.json.decode(how) == {"sigma_rel": 0.1, "steps": [2, 4, 6]}
    assert found.metadata.pop("tensor_digest") == tensor_digest(found.tensors)
    assert usual.metadata.pop("tensor_digest") == tensor_digest(usual.tensors)
    assert found.metadata == usual.metadata


def test_only_the_output_is_written(trained: Project) -> None:
    before = listing(trained.store, "lookup", ".tmp"), listing(trained.root / "runs")
    first = average(trained), (trained.root / "out.safetensors").read_bytes()
    assert first[0].code == 0
    assert (listing(trained.store, "lookup", ".tmp"), listing(trained.root / "runs")) == before
    assert not any((trained.store / ".tmp").iterdir())
    average(trained)
    assert (trained.root / "out.safetensors").read_bytes() == first[1]


def test_narrow_average_is_nearly_the_last_checkpoint(trained: Project) -> None:
    average(trained, "--sigma-rel", "0.005")
    found, last = load(trained.root / "out.safetensors").tensors, load(trained.lora).tensors
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.data, last[name].data)


def test_schedule_free_averages_what_is_saved_not_what_is_trained_on(untrained: Project) -> None:
    sets = (*SETS, "train.optimizer.kind=schedule_free")
    untrained.make("train", sets=sets)
    average(untrained, "--sigma-rel", "0.005", sets=sets)
    found, last = load(untrained.root / "out.safetensors").tensors, load(untrained.lora).tensors
    assert tensor_digest(found) == tensor_digest(last)


@pytest.mark.parametrize("kind", ['lora"\ninit = "pissa', "dora", "lokr"])
def test_every_kind_of_adapter_is_read_back_by_the_public_reader(untrained: Project, kind: str) -> None:
    text = untrained.config.read_text()
    untrained.config.write_text(f'{text}\n[train.adapter]\nkind = "{kind}"\n')
    sets = (*SETS, "train.steps=2", "train.checkpoint_every=1")
    untrained.make("train", sets=sets)
    assert average(untrained, sets=sets).code == 0
    file = load(untrained.root / "out.safetensors")
    factors = read({name: to_mlx(t) for name, t in file.tensors.items()}, file.metadata, MICRO.transformer)
    assert all(mx.isfinite(factor).all().item() for factor in factors.values())
    assert file.tensors.keys() == load(untrained.lora).tensors.keys()


def test_less_than_two_checkpoints_are_an_error_that_says_what_to_run(untrained: Project) -> None:
    none = average(untrained)
    assert (none.code, none.error) == (5, "ema.too_few")
    assert none.result["error"]["fix"].startswith(f"flux2-lora train --config {untrained.config} ")
    sets = (*SETS, "train.checkpoint_every=6")
    untrained.make("train", sets=sets)
    one = average(untrained, sets=sets)
    assert (one.code, one.error) == (5, "ema.too_few")
    assert one.result["error"]["fix"].endswith("train.checkpoint_every=1")
    assert not (untrained.root / "out.safetensors").exists()


def test_checkpoint_forced_by_a_signal_and_steps_beyond_the_settings_are_left_out(untrained: Project) -> None:
    sets = (*SETS, "train.checkpoint_every=3")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, signal.SIGTERM, patch)
        assert untrained.run("train", sets=sets).code == 143
    untrained.make("train", sets=sets)
    assert set(states(untrained)) == {2, 3, 6}
    average(untrained, sets=sets)
    how = load(untrained.root / "out.safetensors").metadata["post_hoc_ema"]
    assert msgspec.json.decode(how)["steps"] == [3, 6]
    assert average(untrained, sets=(*sets, "train.steps=5")).error == "ema.too_few"


def test_damaged_checkpoint_is_refused_and_so_is_a_name_that_no_reader_takes(
    trained: Project, tmp_path: Path
) -> None:
    project = trained.copy(tmp_path / "project")
    (project.root / "out.safetensors").unlink(missing_ok=True)
    refused = project.run("ema", "--output", str(project.root / "out.pt"), sets=SETS)
    assert (refused.code, refused.error) == (2, "ema.output")
    [state] = (project.store / "checkpoints").glob("*/4/state.safetensors")
    flip(state)
    refused = average(project)
    assert (refused.code, refused.error) == (4, "tensors.digest")
    assert str(state) in refused.result["error"]["where"]
    # One that cannot be read at all is not left out unsaid either.
    manifest = state.with_name("manifest.json")
    manifest.unlink()
    refused = average(project)
    assert (refused.code, refused.error) == (4, "checkpoint.unreadable")
    assert str(manifest) in refused.result["error"]["where"]
    assert not (project.root / "out.safetensors").exists()
