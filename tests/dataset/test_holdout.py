from __future__ import annotations

import pytest

from schemas.errors import BadConfig
from schemas.validation import Validation
from stages.dataset.holdout import held_out

# Two sizes of each picture.
NAMES = [(image, size) for image in "abcd" for size in "12"]
ROWS = [{"item_id": image + size, "image_sha256": image, "path": f"{image}.png"} for image, size in NAMES]


def test_nothing_is_held_out_unless_asked():
    assert held_out(ROWS, None) == frozenset()


def test_a_picture_is_held_out_in_all_its_sizes():
    held = held_out(ROWS, Validation(pictures=2))
    assert len(held) == 4
    assert all({f"{item[0]}1", f"{item[0]}2"} <= held for item in held)
    assert held_out(ROWS, Validation(names=("b.png",))) == {"b1", "b2"}


def test_the_seed_chooses_and_the_order_of_rows_does_not():
    choices = {held_out(ROWS, Validation(pictures=1, seed=seed)) for seed in range(20)}
    assert len(choices) == 4
    assert held_out(ROWS[::-1], Validation(pictures=1)) == held_out(ROWS, Validation(pictures=1))


def test_more_pictures_keep_those_already_held_out():
    assert held_out(ROWS, Validation(pictures=1)) < held_out(ROWS, Validation(pictures=2))


def test_all_unknown_names_are_listed():
    with pytest.raises(BadConfig) as raised:
        held_out(ROWS, Validation(names=("e.png", "a.png", "photo.jpg")))
    assert [fault.what.rpartition(" ")[2] for fault in raised.value.faults] == ["e.png", "photo.jpg"]


def test_something_must_be_left_to_train_on():
    with pytest.raises(BadConfig, match="nothing_left"):
        held_out(ROWS, Validation(pictures=4))
