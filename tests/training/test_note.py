"""The note of what a training began: read as it was written or not at all, and waiting for nobody."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from schemas.errors import Damaged
from stages.training.checkpoints import trajectory_of
from stages.training.note import read_note, write_note
from tests.stores.damage import flipped_bits, other_lengths

PARAMS = {"steps": 6, "rank": 4, "learning_rate": 1e-3, "schedule": {"kind": "cosine"}}
INPUTS = {"latents": "a" * 64}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a note lies that was just written."""
    write_note(tmp_path, PARAMS, INPUTS)
    return tmp_path / "trajectory.json"


def test_note_says_what_was_begun(path: Path) -> None:
    note = read_note(path.parent)
    assert note is not None
    assert (note.params, note.inputs, note.trajectory) == (PARAMS, INPUTS, trajectory_of(PARAMS, INPUTS))
    before = path.stat().st_ino
    write_note(path.parent, PARAMS, INPUTS)
    assert path.stat().st_ino == before
    path.unlink()
    assert read_note(path.parent) is None


def test_every_flipped_bit_and_every_other_length_is_refused(path: Path) -> None:
    for _ in flipped_bits(path, 300):
        with pytest.raises(Damaged, match=r"trajectory\.altered"):
            read_note(path.parent)
    for _ in other_lengths(path, 20):
        with pytest.raises(Damaged, match=r"trajectory\.altered"):
            read_note(path.parent)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[" * 100_000, b"5", b'{"trajectory":"","params":{},"inputs":{}}', b'{"params":{},"inputs":{}}'],
)
def test_what_is_no_note_is_refused_and_replaced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"fix: flux2-lora train --config"):
        read_note(path.parent)
    write_note(path.parent, PARAMS, INPUTS)
    assert read_note(path.parent) is not None


def test_settings_that_are_not_those_of_its_trajectory_are_refused(path: Path) -> None:
    note = msgspec.json.decode(path.read_bytes())
    path.write_bytes(
        msgspec.json.format(msgspec.json.encode({**note, "params": {**PARAMS, "rank": 5}}, order="sorted"))
    )
    with pytest.raises(Damaged, match="does not follow from what it lists"):
        read_note(path.parent)


def test_pipe_in_its_place_keeps_nobody_waiting(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Damaged):
        read_note(path.parent)
