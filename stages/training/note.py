"""The note in a run folder of what the training begun last is made of.

The next change of a setting is told against it, and while the training is not finished nothing else says which
checkpoints are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from schemas import results
from schemas.base import UNREADABLE, Strict
from schemas.errors import GIVEN, Damaged
from stages.contract.digests import canonical_json
from stages.contract.publish import regular, write_file
from stages.training.checkpoints import trajectory_of


class Note(Strict, frozen=True):
    """A training's settings and inputs, as its plan has them, and the trajectory they make."""

    trajectory: str
    params: dict[str, Any]
    inputs: dict[str, str]


def read_note(run_folder: Path) -> Note | None:
    """Return the note in a run folder; None when there is none. Raises Damaged unless it is what was written."""
    path = run_folder / results.TRAJECTORY
    try:
        with open(path, "rb", opener=regular) as file:
            data = file.read()
        note = msgspec.json.decode(data, type=Note)
        why = "" if data == _written(note.params, note.inputs) else "it does not follow from what it lists"
    except FileNotFoundError:
        return None
    except (OSError, KeyError, *UNREADABLE) as error:
        note, why = None, str(error)
    if note is None or why:
        raise Damaged(
            "trajectory.altered",
            "the note of what training began is not what was written",
            where=str(path),
            why=why,
            fix=f"flux2-lora train {GIVEN}",
        )
    return note


def write_note(run_folder: Path, params: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Leave the note of a training in its run folder; an equal one stays untouched."""
    path, data = run_folder / results.TRAJECTORY, _written(params, inputs)
    if not path.is_file() or path.read_bytes() != data:
        write_file(path, data)


def _written(params: Mapping[str, Any], inputs: Mapping[str, str]) -> bytes:
    note = {"trajectory": trajectory_of(params, inputs), "params": params, "inputs": inputs}
    return msgspec.json.format(canonical_json(note)) + b"\n"
