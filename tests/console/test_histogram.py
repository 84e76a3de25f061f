from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.console.histogram import Drawn, timesteps_chart

DRAWN = Drawn(np.array([0.05, 0.15, 0.15, 0.95]), np.array([1.0, 2.0, 4.0, 0.5]))


def test_shares_count_draws_and_pull_counts_their_weights() -> None:
    shares, pull = DRAWN.shares(10), DRAWN.pull(10)
    assert shares[[0, 1, 9]] == pytest.approx([0.25, 0.5, 0.25])
    assert pull[[0, 1, 9]] == pytest.approx([0.25, 1.5, 0.125])
    assert pull.sum() == pytest.approx(DRAWN.weights.mean())


def test_the_ends_of_the_range_are_inside() -> None:
    ends = Drawn(np.array([0.0, 1.0]), np.ones(2))
    assert ends.shares(4).tolist() == [0.5, 0.0, 0.0, 0.5]


def test_the_same_draws_give_the_same_bytes_and_others_do_not(tmp_path: Path) -> None:
    other = Drawn(DRAWN.timesteps, DRAWN.weights * np.array([1, 1, 1, 4]))
    for name, drawn in {"one": DRAWN, "again": DRAWN, "other": other}.items():
        timesteps_chart({"512 px": drawn}, "content", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()
