"""The chart of a learning-rate range test."""

from __future__ import annotations

import io
from collections.abc import Sequence

from stages.console.charts import DOTS_PER_INCH


def sweep_chart(rates: Sequence[float], curves: tuple[Sequence[float], Sequence[float]], suggested: float) -> bytes:
    """Return a PNG of the loss after a step at each rate, raw and smoothed, with the suggested rate marked."""
    losses, smoothed = curves
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A person's own style file would change the bytes.
    with rc_context(rcParamsDefault):
        figure = Figure(figsize=(8, 5), dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.09, 0.11, 0.88, 0.8))
        axes.set_title("loss while the learning rate rises", loc="left", fontsize=11)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.plot(rates, losses, color="tab:blue", linewidth=0.8, alpha=0.4)
        axes.plot(rates, smoothed, color="tab:blue", linewidth=2.0)
        axes.axvline(suggested, color="tab:orange", linewidth=1.6, label=f"suggested {suggested:.1e}")
        axes.legend(frameon=False)
        data = io.BytesIO()
        # The library's version would otherwise stand in the file.
        figure.savefig(data, format="png", metadata={"Software": None})
        return data.getvalue()
