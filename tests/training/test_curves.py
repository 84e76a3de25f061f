"""Four whole trainings, step by step, against what they were when they were recorded."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from schemas.ema import Ema
from schemas.objective import Bell, Huber, Output
from schemas.optimizers import AdamW
from schemas.schedules import Constant
from schemas.timesteps import Uniform
from tests.golden import tiny
from tests.golden.recorders.curves import CURVES, MEASURES, STEPS, trace

# Another BLAS moves them by 5e-7.
TOLERANCE = 1e-5
AGAIN = "if that is meant: python tests/golden/record.py curves"


def recorded(name: str) -> np.ndarray:
    """Return the measures [20, 11] of a training as recorded."""
    with np.load(tiny.GOLDEN / "curves.npz") as file:
        return file[name]


def parting(expected: np.ndarray, found: np.ndarray) -> str:
    """Say at which step two trainings part, in what first, and what follows from it; "" if they do not part."""
    other = ~np.isclose(found, expected, rtol=TOLERANCE, atol=0)
    if not other.any():
        return ""
    step = int(other.any(axis=1).argmax())
    first, *rest = np.flatnonzero(other[step])
    follows = ", ".join(MEASURES[index] for index in rest) or "nothing yet"
    numbers = f"{found[step, first]:.9g}, expected {expected[step, first]:.9g}"
    return f"step {step + 1}: {MEASURES[first]} {numbers}; in the same step follows: {follows}"


@pytest.mark.parametrize("name", CURVES)
def test_training_is_step_by_step_what_it_was(name: str) -> None:
    found = trace(CURVES[name])
    assert found.shape == (STEPS, len(MEASURES))
    assert not (change := parting(recorded(name), found)), f"{name}: {change}. {AGAIN}"


@pytest.mark.parametrize(
    ("setting", "first", "follows"),
    [
        ({"caption_dropout": 0.9}, "text", ["loss"]),
        ({"noise_offset": 0.01}, "noise", ["loss"]),
        ({"timesteps": Uniform()}, "timesteps", ["loss"]),
        ({"weighting": Bell()}, "weights", ["loss"]),
        ({"preservation": Output(class_word="cat")}, "latents", ["text", "target"]),
        ({"schedule": Constant(warmup_steps=2)}, "learning rate", ["factors"]),
        ({"loss": Huber()}, "loss", ["gradient norm"]),
        ({"gradient_accumulation": 2}, "latents", ["text", "noise", "timesteps"]),
        ({"optimizer": AdamW(beta1=0.0, weight_decay=0.1)}, "factors", []),
        ({"ema": Ema()}, "average", []),
    ],
    ids=str,
)
def test_changed_setting_is_named_by_what_it_changes_first(
    setting: dict[str, object], first: str, follows: list[str]
) -> None:
    changed = msgspec.structs.replace(CURVES["plain"], steps=1, **setting)
    said, _, after = parting(recorded("plain")[:1], trace(changed)).partition("; in the same step follows: ")
    assert said.startswith(f"step 1: {first} ")
    assert set(follows) <= set(after.split(", "))


def test_trainings_part_at_the_step_from_which_on_they_differ() -> None:
    expected = recorded("plain")
    found = expected.copy()
    found[11:, MEASURES.index("factors")] *= 1 + 2 * TOLERANCE
    found[12:, MEASURES.index("loss")] *= 1 + 2 * TOLERANCE
    assert parting(expected, expected * (1 + 0.5 * TOLERANCE)) == ""
    assert parting(expected, found).startswith("step 12: factors ")


def test_recorded_trainings_learn() -> None:
    for name in CURVES:
        factors = recorded(name)[:, MEASURES.index("factors")]
        assert np.unique(factors).size == STEPS
