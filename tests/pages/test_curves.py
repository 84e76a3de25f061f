"""Curves of a page: which there are, where their points lie, and that thinning them hides nothing."""

from __future__ import annotations

import math
import re

import pytest

from stages.pages.curves import MOST_POINTS, SIDE, panels, shared_panels


def metrics(steps: int, **more: object) -> list[dict[str, object]]:
    return [{"step": step, "loss": 2.0 - step / steps, **more} for step in range(1, steps + 1)]


def points(path: str) -> list[tuple[float, float]]:
    found = re.fullmatch(r"M(.*)", path)
    assert found
    pairs = [each.split(" ") for each in found[1].split("L")]
    return [(float(x), float(y)) for x, y in pairs]


def test_only_what_was_recorded_has_a_panel() -> None:
    assert panels([]) == []
    assert panels([{"step": 1}, {"step": 2, "loss": None}]) == []
    assert [each.title for each in panels(metrics(3, peak_bytes=2e9))] == [
        "loss (faint: each step)",
        "peak memory, GB",
    ]


def test_line_lies_where_its_ticks_say() -> None:
    [panel] = panels([{"step": step, "learning_rate": rate} for step, rate in ((10, 0.0), (20, 0.5), (30, 1.0))])
    assert (panel.first, panel.last) == (10, 30)
    [series] = panel.series
    drawn = points(series.path)
    assert [x for x, _ in drawn] == [0, SIDE / 2, SIDE]
    place = dict((label, percent) for percent, label in panel.y_ticks)
    assert [y for _, y in drawn][::2] == pytest.approx([10 * place["0"], 10 * place["1"]], abs=0.1)
    assert dict((label, percent) for percent, label in panel.x_ticks)["20"] == 50


def test_smoothed_line_ends_where_the_figures_do_and_every_step_is_faint() -> None:
    [panel] = panels(metrics(200))
    [series] = panel.series
    assert len(points(series.faint)) == 200
    assert series.points["values"][-1] == 1.0
    assert 1.0 < series.points["smooth"][-1] < 1.1


def test_thinning_keeps_spikes_and_ends() -> None:
    lines = metrics(20_000)
    lines[12_345]["loss"] = 1.9
    [panel] = panels(lines)
    [series] = panel.series
    drawn = points(series.faint)
    low, high = ((float(label), 10 * percent) for percent, label in (panel.y_ticks[0], panel.y_ticks[-1]))
    height = low[1] + (1.9 - low[0]) * (high[1] - low[1]) / (high[0] - low[0])
    assert min(math.hypot(x - SIDE * 12_345 / 19_999, y - height) for x, y in drawn) < 1
    assert len(drawn) <= MOST_POINTS
    assert len(series.points["steps"]) <= MOST_POINTS
    assert (series.points["steps"][0], series.points["steps"][-1]) == (1, 20_000)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1", True])
def test_what_is_no_number_leaves_a_gap(value: object) -> None:
    lines = metrics(4)
    lines[1]["loss"] = value
    [panel] = panels(lines)
    assert panel.series[0].points["steps"] == [1, 3, 4]


def test_validation_is_drawn_over_the_loss_with_its_dots() -> None:
    lines = [{"step": 0, "validation_loss": 3.0}, *metrics(4)]
    lines[-1]["validation_loss"] = 2.5
    [panel] = panels(lines)
    assert [each.label for each in panel.series] == ["loss", "validation loss"]
    assert panel.first == 0
    assert len(panel.series[1].dots) == 2
    assert all(0 <= y <= 100 for _, y in panel.series[1].dots)


def test_single_step_is_a_dot() -> None:
    [panel] = panels(metrics(1))
    assert len(panel.series[0].dots) == 1
    assert panel.last > panel.first


def test_runs_share_their_axes_and_keep_their_colors() -> None:
    runs = {"a": metrics(10, validation_loss=1.0), "b": metrics(20)}
    found = shared_panels(runs)
    assert [each.title for each in found] == ["loss (smoothed)", "validation loss"]
    assert {(each.first, each.last) for each in found} == {(1, 20)}
    assert [(each.label, each.color, each.faint) for each in found[0].series] == [
        ("a", "blue", ""),
        ("b", "orange", ""),
    ]
    assert [each.label for each in found[1].series] == ["a"]
    assert points(found[0].series[0].path)[-1][0] == pytest.approx(SIDE * 9 / 19, abs=0.1)


def test_summary_says_the_curve_in_words() -> None:
    [panel] = panels([{"step": 1, "learning_rate": 0.1}, {"step": 2, "learning_rate": 0.2}])
    assert panel.summary == "learning rate: learning rate from 0.1 to 0.2, steps 1 to 2"
