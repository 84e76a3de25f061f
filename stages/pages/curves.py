"""Curves for a page: lines of SVG in a square of 1000 x 1000 that the page stretches, and the numbers to read off.

Labels are text beside the square: they keep their size on every screen. N is the number of points of a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.console.charts import CURVES, OUTLIERS_PERCENT, Curve, smoothed

# Of the loss, where a training also holds its class.
PARTS = (
    Curve("loss_data", "loss of the pictures (faint: each step)", "tab:blue", smooth=True),
    Curve("loss_preservation", "loss of holding the class (faint: each step)", "tab:brown", smooth=True),
)
SECONDS = Curve("seconds", "seconds per step (faint: each step)", "tab:purple", smooth=True)
ALL = (*CURVES, *PARTS, SECONDS)
SIDE = 1000
# More points than this, a screen cannot show.
MOST_POINTS = 600
# More dots than this touch each other on a phone.
MOST_DOTS = 24
# One a run, in the order of matplotlib's own.
RUN_COLORS = ("blue", "orange", "green", "red", "purple", "brown")

Metrics = Sequence[Mapping[str, Any]]
Tick = tuple[float, str]


@dataclass(frozen=True)
class Series:
    """One line: its legend, its colour by name, SVG paths (`faint` of every step, `path` smoothed), its points."""

    label: str
    color: str
    path: str
    faint: str
    dots: Sequence[tuple[float, float]]
    points: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One set of axes. Ticks are (percent from the left or the top, label); `first` and `last` are steps."""

    title: str
    first: int
    last: int
    series: Sequence[Series]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    summary: str

    @property
    def points(self) -> list[dict[str, object]]:
        """The numbers to read off, as the page's script takes them."""
        return [{"label": each.label, **each.points} for each in self.series]


@dataclass(frozen=True)
class _Values:
    """One field of one run: steps [N] and values [N], all finite, float64; `line` is what is drawn, `dotted` few."""

    label: str
    color: str
    steps: np.ndarray
    values: np.ndarray
    line: np.ndarray
    dotted: bool = False


def panels(metrics: Metrics) -> list[Panel]:
    """Return the panels of one run, in the colours of its training curves; a field never recorded has none."""
    return _panels(
        [(curve, _of_curve(metrics, curve, "", curve.color.removeprefix("tab:"), dotted=True)) for curve in ALL]
    )


def shared_panels(runs: Mapping[str, Metrics]) -> list[Panel]:
    """Return the panels of several runs, a colour and a legend each; the validation loss has one of its own."""
    colors = dict(zip(runs, RUN_COLORS, strict=False))
    validation = Curve("validation_loss", "validation loss", "")
    curves = [CURVES[0], validation, *ALL[1:]]
    wanted = []
    for curve in curves:
        lines = [_of_curve(metrics, curve, name, colors[name], dotted=False) for name, metrics in runs.items()]
        title = curve.title.replace("faint: each step", "smoothed")
        dots = curve is validation
        values = [replace(each, dotted=dots) for line in lines for each in line]
        wanted.append((replace(curve, title=title, smooth=curve.smooth or dots), values))
    return _panels(wanted, faint=False)


def _of_curve(metrics: Metrics, curve: Curve, label: str, color: str, *, dotted: bool) -> list[_Values]:
    """Return the values of a curve, and with `dotted` those drawn over it."""
    found = [_values(metrics, curve, label or curve.field.replace("_", " "), color)]
    if dotted and curve.dotted:
        over = Curve(curve.dotted, "", "ink", factor=curve.factor)
        found.append(replace(_values(metrics, over, curve.dotted.replace("_", " "), "ink"), dotted=True))
    return [each for each in found if len(each.steps)]


def _values(metrics: Metrics, curve: Curve, label: str, color: str) -> _Values:
    points = [(line["step"], number) for line in metrics if (number := _finite(line.get(curve.field))) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    values = values * curve.factor
    line = smoothed(np.clip(values, *_usual(values))) if curve.smooth and len(values) else values
    return _Values(label, color, steps, values, line)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _usual(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [OUTLIERS_PERCENT, 100 - OUTLIERS_PERCENT])
    return float(low), float(high)


def _panels(wanted: Sequence[tuple[Curve, list[_Values]]], *, faint: bool = True) -> list[Panel]:
    """Return a panel for every curve with values, all over the same steps."""
    shown = [(curve, values) for curve, values in wanted if values]
    if not shown:
        return []
    first = min(each.steps[0] for _, values in shown for each in values)
    last = max(each.steps[-1] for _, values in shown for each in values)
    return [_panel(curve, values, (first, max(last, first + 1)), faint=faint) for curve, values in shown]


def _panel(curve: Curve, values: list[_Values], across: tuple[float, float], *, faint: bool) -> Panel:
    low, high = _range(curve, values, faint=faint)
    series = [_series(each, across, (low, high), faint=faint and curve.smooth) for each in values]
    said = [f"{each.label} from {each.line[0]:.4g} to {each.line[-1]:.4g}" for each in values]
    return Panel(
        title=curve.title,
        first=int(across[0]),
        last=int(across[1]),
        series=series,
        x_ticks=_ticks(across, 5, integer=True),
        y_ticks=[(100 - percent, label) for percent, label in _ticks((low, high), 4)],
        summary=f"{curve.title}: {'; '.join(said)}, steps {across[0]:.0f} to {across[1]:.0f}",
    )


def _range(curve: Curve, values: list[_Values], *, faint: bool) -> tuple[float, float]:
    if not curve.smooth:
        return 0.0, 1.15 * max(float(each.values.max()) for each in values) or 1.0
    ranges = [
        _usual(each.values) if faint and not each.dotted else (each.line.min(), each.line.max()) for each in values
    ]
    low, high = float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    return low - room, high + room


def _ticks(between: tuple[float, float], most: int, *, integer: bool = False) -> list[Tick]:
    """Return round numbers in a range, each with its place in percent."""
    from matplotlib.ticker import MaxNLocator

    low, high = between
    found = MaxNLocator(nbins=most, integer=integer, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    inside = [float(each) for each in found if low <= each <= high]
    return [(round(100 * (each - low) / (high - low), 3), f"{each:.6g}") for each in inside]


def _series(values: _Values, across: tuple[float, float], upward: tuple[float, float], *, faint: bool) -> Series:
    def placed(steps: np.ndarray, numbers: np.ndarray) -> list[tuple[float, float]]:
        """Return points [N] in the square, y downwards."""
        x = SIDE * (steps - across[0]) / (across[1] - across[0])
        y = SIDE * (1 - (numbers - upward[0]) / (upward[1] - upward[0]))
        return [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, np.clip(y, -SIDE, 2 * SIDE), strict=True)]

    some = _thinned(len(values.steps))
    ends = _extremes(values.values)
    points = {"steps": values.steps[some].astype(int).tolist(), "values": _short(values.values[some])}
    if values.line is not values.values:
        points["smooth"] = _short(values.line[some])
    few = len(values.steps) <= (MOST_DOTS if values.dotted else 1)
    return Series(
        label=values.label,
        color=values.color,
        path=_path(placed(values.steps[some], values.line[some])),
        faint=_path(placed(values.steps[ends], values.values[ends])) if faint and not values.dotted else "",
        dots=[(x / 10, y / 10) for x, y in placed(values.steps[some], values.line[some])] if few else [],
        points=points,
    )


def _thinned(count: int) -> np.ndarray:
    """Return evenly spread places among `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int))


def _extremes(values: np.ndarray) -> np.ndarray:
    """Return the places of the least and the greatest of each stretch: thinning hides no spike."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
    ends = [(each[values[each].argmin()], each[values[each].argmax()]) for each in stretches]
    return np.unique(np.array(ends))


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
