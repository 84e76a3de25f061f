"""Checkpoints: whole or not there, found by step, passed over when damaged, never mixed up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from schemas.errors import Damaged
from schemas.manifest import CONTRACT_VERSION, Manifest
from stages.stores.tensors import Tensor
from stages.training.checkpoints import (
    Checkpoint,
    Snapshot,
    find_checkpoints,
    list_checkpoints,
    newest,
    public_checkpoints,
    read_checkpoint_manifest,
    trajectory_folder,
    trajectory_of,
    write_checkpoint,
)

PARAMS = {"steps": 6, "rank": 4, "schedule": {"kind": "constant"}}
INPUTS = {"latents": "a" * 64}
TRAJECTORY = trajectory_of(PARAMS, INPUTS)
FILES = ("state.safetensors", "lora.safetensors", "metrics.jsonl", "manifest.json")


def snapshot(step: int, *, public: bool = True) -> Snapshot:
    state = {"lora.x": Tensor("F32", np.full((2, 3), step, np.float32))}
    lora = {"diffusion_model.x": Tensor("BF16", np.full((2, 3), step, np.uint16))}
    metrics = [{"step": each, "loss": 1.0 / each} for each in range(1, step + 1)]
    return Snapshot(
        step=step, public=public, state=state, lora=lora, ema=None, metadata={"format": "pt"}, metrics=metrics
    )


def write(store: Path, *steps: int) -> list[Checkpoint]:
    return [write_checkpoint(store, TRAJECTORY, snapshot(step)) for step in steps]


def found(store: Path, most: int = 100) -> tuple[int | None, list[str]]:
    """Return the step of the newest checkpoint and the warnings on the way to it."""
    warnings: list[str] = []
    checkpoint = newest([store], TRAJECTORY, most, warnings.append)
    return (None if checkpoint is None else checkpoint.step), warnings


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_checkpoint_gives_back_what_it_was_written_from(tmp_path: Path) -> None:
    write(tmp_path, 4)
    checkpoint = newest([tmp_path], TRAJECTORY, 4, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert np.array_equal(checkpoint.state()["lora.x"].data, np.full((2, 3), 4, np.float32))
    assert checkpoint.metrics() == snapshot(4).metrics
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == sorted(FILES)


def test_newest_of_at_most_so_many_steps_is_found(tmp_path: Path) -> None:
    write(tmp_path, 2, 10, 9)
    assert found(tmp_path) == (10, [])
    assert found(tmp_path, 9) == (9, [])
    assert found(tmp_path, 5) == (2, [])
    assert found(tmp_path, 1) == (None, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, name: str, harm: object) -> None:
    _, last = write(tmp_path, 2, 4)
    harm(last.folder / name)
    step, warnings = found(tmp_path)
    assert step == 2
    assert len(warnings) == 1
    assert "falling back to step 2, 2 steps earlier" in warnings[0]
    assert str(last.folder) in warnings[0]


def test_damage_everywhere_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    written = write(tmp_path, 2, 4)
    for each in written:
        flip(each.folder / "state.safetensors")
    with pytest.raises(Damaged, match="damaged checkpoint") as raised:
        found(tmp_path)
    faults = raised.value.faults
    assert [fault.where for fault in faults] == [str(each.folder / "state.safetensors") for each in written[::-1]]
    # There is none before to resume from.
    assert all(fault.fix.endswith("start over: flux2-lora train --config ... --force") for fault in faults)


def test_pipe_or_link_in_place_of_a_manifest_keeps_nobody_waiting(tmp_path: Path) -> None:
    before, last = write(tmp_path, 2, 4)
    path = last.folder / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    assert found(tmp_path)[0] == 2
    path.unlink()
    path.symlink_to(before.folder / "manifest.json")
    assert found(tmp_path)[0] == 2


def test_bytes_are_proved_when_they_are_read(tmp_path: Path) -> None:
    [checkpoint] = write(tmp_path, 2)
    flip(checkpoint.folder / "state.safetensors")
    flip(checkpoint.folder / "metrics.jsonl")
    with pytest.raises(Damaged):
        checkpoint.state()
    with pytest.raises(Damaged):
        checkpoint.metrics()


def test_checkpoint_under_another_step_or_training_is_refused(tmp_path: Path) -> None:
    [checkpoint] = write(tmp_path, 2)
    other = shutil.copytree(checkpoint.folder, checkpoint.folder.with_name("8"))
    with pytest.raises(Damaged, match=r"checkpoint\.altered"):
        read_checkpoint_manifest(other)
    elsewhere = shutil.copytree(checkpoint.folder, trajectory_folder(tmp_path, "f" * 64) / "2")
    with pytest.raises(Damaged, match=r"checkpoint\.altered"):
        read_checkpoint_manifest(elsewhere)
    assert [each.step for each in list_checkpoints([tmp_path], TRAJECTORY)] == [2]


def test_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    [checkpoint] = write(tmp_path, 2)
    flip(checkpoint.folder / "state.safetensors")
    write(tmp_path, 2)
    assert found(tmp_path) == (2, [])
    assert not any((tmp_path / ".tmp").iterdir())


def test_litter_beside_checkpoints_is_not_taken_for_one(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (trajectory_folder(tmp_path, TRAJECTORY) / "9.partial").mkdir()
    (trajectory_folder(tmp_path, TRAJECTORY) / "notes").write_text("")
    # A digit to Python, and no number.
    (trajectory_folder(tmp_path, TRAJECTORY) / "²").mkdir()
    assert found(tmp_path) == (2, [])


def test_first_store_that_has_a_step_wins(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    write(theirs, 2, 4)
    write(mine, 2)
    listed = list_checkpoints([mine, theirs], TRAJECTORY)
    assert [each.step for each in listed] == [2, 4]
    assert listed[0].folder.is_relative_to(mine)


def test_what_no_store_has_readable_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    own, others = write(mine, 2, 4), write(theirs, 4, 6)
    for each in (*own, others[1]):
        flip(each.folder / "manifest.json")
    whole, unreadable = find_checkpoints([mine, theirs], TRAJECTORY)
    assert [each.folder for each in whole] == [others[0].folder]
    assert {step: error.faults[0].where for step, error in unreadable.items()} == {
        2: str(own[0].folder / "manifest.json"),
        6: str(others[1].folder / "manifest.json"),
    }


def manifest(steps: int) -> Manifest:
    return Manifest(
        contract=CONTRACT_VERSION,
        stage="train",
        version=1,
        key="0" * 64,
        params={**PARAMS, "steps": steps},
        inputs=INPUTS,
        roles={},
        files={},
        fragments={},
        counts={},
        provenance={},
        digest="",
        self_digest="",
    )


def test_people_see_every_nth_checkpoint_and_the_last(tmp_path: Path) -> None:
    write(tmp_path, 2, 3, 4, 6, 8)
    shown = {
        every: [each.step for each in public_checkpoints([tmp_path], manifest(6), every)[0]] for every in (2, 3, 5)
    }
    assert shown == {2: [2, 4, 6], 3: [3, 6], 5: [6]}
    flip(trajectory_folder(tmp_path, TRAJECTORY) / "4" / "manifest.json")
    unreadable = {every: list(public_checkpoints([tmp_path], manifest(6), every)[1]) for every in (2, 3)}
    assert unreadable == {2: [4], 3: []}


def test_trajectory_leaves_out_steps_and_nothing_else() -> None:
    assert trajectory_of({**PARAMS, "steps": 7}, INPUTS) == TRAJECTORY
    assert trajectory_of({**PARAMS, "rank": 5}, INPUTS) != TRAJECTORY
    assert trajectory_of(PARAMS, {"latents": "b" * 64}) != TRAJECTORY


def test_manifest_with_a_further_field_is_refused(tmp_path: Path) -> None:
    [checkpoint] = write(tmp_path, 2)
    path = checkpoint.folder / "manifest.json"
    fields = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**fields, "extra": 1}))
    with pytest.raises(Damaged, match=r"checkpoint\.unreadable"):
        read_checkpoint_manifest(checkpoint.folder)
