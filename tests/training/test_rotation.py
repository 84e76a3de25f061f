"""Rotation: which checkpoints go, by which loss they are judged, and that nothing else is deleted."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from schemas import results
from schemas.rotation import Rotation
from stages.stores.tensors import Tensor
from stages.training.checkpoints import Checkpoint, Snapshot, list_checkpoints, trajectory_folder, write_checkpoint
from stages.training.rotation import Saved, losses, plan_rotation, rotate

GB = 10**9
TRAJECTORY = "0" * 64


def saved(*steps: int, size_bytes: int = GB, losses: Sequence[float | None] = ()) -> list[Saved]:
    known = [*losses, *[None] * (len(steps) - len(losses))]
    return [Saved(step, size_bytes, 100.0 - step, loss) for step, loss in zip(steps, known, strict=True)]


@pytest.mark.parametrize(
    ("rotation", "gone"),
    [
        (Rotation(), []),
        (Rotation(keep_last=2), [10, 20, 30]),
        (Rotation(keep_last=1), [10, 20, 30, 40]),
        (Rotation(keep_last=9), []),
        (Rotation(keep_every=20), [10, 30]),
        (Rotation(keep_last=1, keep_every=20), [10, 30]),
        (Rotation(keep_last=1, pin=(10, 77)), [20, 30, 40]),
        (Rotation(max_age_days=75), [10, 20]),
        (Rotation(max_age_days=75, pin=(10,)), [20]),
        (Rotation(max_age_days=0.001), [10, 20, 30, 40]),
        (Rotation(max_gigabytes=3), [10, 20]),
        (Rotation(max_gigabytes=3, pin=(10,)), [20, 30]),
        (Rotation(max_gigabytes=0.001), [10, 20, 30, 40]),
        (Rotation(keep_every=20, max_gigabytes=2), [10, 20, 30]),
        (Rotation(keep_last=3, max_gigabytes=2), [10, 20, 30]),
    ],
)
def test_rule_names_what_goes(rotation: Rotation, gone: list[int]) -> None:
    assert plan_rotation(rotation, saved(10, 20, 30, 40, 50), 50) == gone


def test_best_is_kept_and_of_equals_the_later() -> None:
    listed = saved(10, 20, 30, 40, 50, losses=[0.9, 0.2, 0.2, float("nan"), 0.5])
    assert plan_rotation(Rotation(keep_last=1), listed, 50) == [10, 20, 40]
    assert plan_rotation(Rotation(keep_last=1, keep_best=False), listed, 50) == [10, 20, 30, 40]


def test_one_saved_just_now_and_the_newest_are_kept_both() -> None:
    # A shorter training of the same trajectory goes on below a longer one.
    assert plan_rotation(Rotation(keep_last=1), saved(10, 20, 90), 20) == [10]


def test_order_of_the_list_changes_nothing() -> None:
    listed = saved(10, 20, 30, 40, 50, losses=[0.1, 0.3, 0.2, 0.5, 0.4])
    rotation = Rotation(keep_last=1, max_gigabytes=2)
    assert plan_rotation(rotation, listed[::-1], 50) == plan_rotation(rotation, listed, 50) == [20, 30, 40]


def test_nothing_saved_means_nothing_to_delete() -> None:
    assert plan_rotation(Rotation(keep_last=1), [], 5) == []


def test_training_loss_is_the_mean_over_the_last_hundred_finite_steps() -> None:
    metrics = [{"step": step, "loss": float(step)} for step in range(1, 301)]
    metrics[299]["loss"] = float("nan")
    assert losses(metrics, [2, 200, 300]) == {2: 1.5, 200: 150.5, 300: 249.5}


def test_validation_loss_is_preferred_and_the_last_one_counts() -> None:
    metrics: list[dict[str, float | None]] = [
        {"step": step, "loss": 9.0, **({"validation_loss": step / 10} if step % 4 == 0 else {})}
        for step in range(1, 11)
    ]
    assert losses(metrics, [3, 4, 7, 10]) == {4: 0.4, 7: 0.4, 10: 0.8}


def write(store: Path, run_folder: Path, step: int) -> Checkpoint:
    tensors = {"a": Tensor("F32", np.full((64, 64), step, np.float32))}
    snapshot = Snapshot(
        step=step, public=True, state=tensors, lora=tensors, ema=None, metadata={}, metrics=[{"step": step}]
    )
    checkpoint = write_checkpoint(store, TRAJECTORY, snapshot)
    run_folder.mkdir(exist_ok=True)
    (run_folder / results.checkpoint(step)).write_bytes(checkpoint.lora.read_bytes())
    return checkpoint


def test_only_this_trajectorys_checkpoints_and_their_copies_are_deleted(tmp_path: Path) -> None:
    store, run_folder = tmp_path / "store", tmp_path / "run"
    written = [write(store, run_folder, step) for step in (1, 2, 3, 4)]
    other = store / "checkpoints" / ("1" * 64) / "1"
    other.mkdir(parents=True)
    foreign = trajectory_folder(store, TRAJECTORY) / "notes"
    foreign.mkdir()
    damaged = trajectory_folder(store, TRAJECTORY) / "9"
    damaged.mkdir()
    (run_folder / results.checkpoint(2)).write_bytes(b"someone's own")
    assert rotate(store, run_folder, Rotation(keep_last=1), written[-1], []) == [1, 2, 3]
    assert [each.step for each in list_checkpoints([store], TRAJECTORY)] == [4]
    assert other.is_dir()
    assert foreign.is_dir()
    assert damaged.is_dir()
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "checkpoint_2.safetensors",
        "checkpoint_4.safetensors",
    ]
    assert not any((store / ".tmp").iterdir())


def test_age_is_that_of_the_manifest(tmp_path: Path) -> None:
    store, run_folder = tmp_path / "store", tmp_path / "run"
    written = [write(store, run_folder, step) for step in (1, 2, 3)]
    old = time.time() - 3 * 86_400
    os.utime(written[0].folder / "manifest.json", (old, old))
    assert rotate(store, run_folder, Rotation(max_age_days=2), written[-1], []) == [1]


def test_rotation_that_keeps_all_deletes_nothing(tmp_path: Path) -> None:
    store, run_folder = tmp_path / "store", tmp_path / "run"
    written = [write(store, run_folder, step) for step in (1, 2)]
    assert rotate(store, run_folder, Rotation(keep_last=2), written[-1], []) == []
    assert len(list(run_folder.iterdir())) == 2
