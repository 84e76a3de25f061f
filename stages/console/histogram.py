"""Histograms of drawn timesteps: how often each noise level is trained, and how much it counts in the loss.

Drawn without a display and to the same bytes for the same input. Letters: N draws, K equal bins of t in 0..1.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.console.charts import DOTS_PER_INCH
from stages.contract.publish import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40


@dataclass(frozen=True)
class Drawn:
    """Timesteps [N] in 0..1 and the weight [N] of the loss at each."""

    timesteps: np.ndarray
    weights: np.ndarray

    def shares(self, bins: int) -> np.ndarray:
        """Return the share [K] of the draws in each bin."""
        return np.histogram(self.timesteps, bins, (0.0, 1.0))[0] / len(self.timesteps)

    def pull(self, bins: int) -> np.ndarray:
        """Return the share [K] of the draws times their weight; it sums to the mean weight."""
        return np.histogram(self.timesteps, bins, (0.0, 1.0), weights=self.weights)[0] / len(self.timesteps)


def timesteps_chart(drawn: Mapping[str, Drawn], title: str, path: Path) -> None:
    """Write a PNG with a line per entry of `drawn`: above how often each noise level comes, below what it counts."""
    from matplotlib import rc_context, rcParamsDefault

    # A person's own style file would change the bytes.
    with rc_context(rcParamsDefault):
        write_file(path, _png(drawn, title))


def _png(drawn: Mapping[str, Drawn], title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    often, counts = figure.subplots(2, 1, sharex=True)
    _draw(often, f"{title}: how often", {name: each.shares(BINS) for name, each in drawn.items()})
    _draw(counts, "how often x weight in the loss", {name: each.pull(BINS) for name, each in drawn.items()})
    often.legend(frameon=False)
    counts.set_xlabel("t: 0 is the picture, 1 is pure noise")
    data = io.BytesIO()
    # The library's version would otherwise stand in the file.
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _draw(axes: Axes, title: str, lines: Mapping[str, np.ndarray]) -> None:
    """Draw densities: 1 is what uniform timesteps have everywhere."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for name, shares in lines.items():
        axes.stairs(shares * len(shares), np.linspace(0, 1, len(shares) + 1), label=name, linewidth=1.6)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
