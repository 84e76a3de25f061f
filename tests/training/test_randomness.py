from __future__ import annotations

import mlx.core as mx
import pytest

from stages.training.randomness import distinct, dropped, integer, noise, uniform

ITEMS = [f"item-{index}" for index in range(4000)]


def test_draws_are_the_same_in_every_process_and_version() -> None:
    assert integer(42, 7, "a", "noise") == 0xDF93E1412B5A4038
    assert uniform(42, 7, "a", "timestep") == 0.7586591696787875


@pytest.mark.parametrize(
    "other", [(43, 7, "a", "noise"), (42, 8, "a", "noise"), (42, 7, "b", "noise"), (42, 7, "a", "flip")]
)
def test_every_part_of_a_draw_counts(other: tuple) -> None:
    assert integer(42, 7, "a", "noise") != integer(*other)


def test_noise_of_an_item_does_not_depend_on_its_batch() -> None:
    together = noise(1, 2, ["a", "b"], (3, 2, 2))
    assert together.shape == (2, 3, 2, 2)
    assert mx.array_equal(together[1], noise(1, 2, ["b"], (3, 2, 2))[0])
    assert not mx.array_equal(together[0], together[1])


def test_noise_is_standard_normal() -> None:
    drawn = noise(1, 2, ["a"], (100_000,))
    assert abs(drawn.mean().item()) < 0.015
    assert abs(drawn.std().item() - 1) < 0.01


def test_an_item_that_comes_again_in_a_window_gets_draws_of_its_own() -> None:
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a#1", "a#2"]


def test_captions_are_dropped_at_the_asked_rate_and_never_at_zero() -> None:
    assert sum(dropped(1, 2, ITEMS, 0.05)) / len(ITEMS) == pytest.approx(0.05, abs=0.01)
    assert not any(dropped(1, 2, ITEMS, 0.0))
    assert all(dropped(1, 2, ITEMS, 1.0))
