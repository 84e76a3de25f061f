"""timesteps: which noise levels a configuration trains, as a histogram and a table, before any training.

The draws are those of training: same seed, same function, one picture a step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from schemas.manifest import Result
from schemas.run import Config
from schemas.timesteps import Shift
from stages.console import messages
from stages.console.invocation import PATH, shared
from stages.contract.config import load_config
from stages.dataset.buckets import PATCH_PX

if TYPE_CHECKING:
    from stages.console.histogram import Drawn

ROWS = 10

HELP = """Draw which noise levels [train.timesteps] trains and what each counts, as a histogram and a table.

\b
Example:
  flux2-lora timesteps --config pipelines/demo.toml --set train.timesteps.kind=content
"""


def sizes_px(config: Config) -> list[int]:
    """Return the resolutions whose pictures see different noise: one where that does not depend on the size."""
    sizes = sorted(set(config.validate.resolutions))
    return sizes if isinstance(config.train.timesteps, Shift) else sizes[:1]


def drawn_at(config: Config, size_px: int, draws: int) -> Drawn:
    """Return what `draws` steps of one picture of size_px x size_px draw. Raises BadConfig for an empty window."""
    import numpy as np

    from stages.console.histogram import Drawn
    from stages.training.timesteps import Moment, draw
    from stages.training.weighting import resolved, weights

    train, tokens = config.train, (size_px // PATCH_PX) ** 2
    moments = (Moment(config.run.seed, step, step) for step in range(draws))
    timesteps = np.concatenate([draw(train.timesteps, moment, ["picture"], tokens) for moment in moments])
    return Drawn(timesteps, weights(resolved(train.weighting, train.timesteps), timesteps))


def rows(drawn: Mapping[str, Drawn]) -> list[list[str]]:
    """Return a row per tenth of t, from noise to picture: the share of the draws, and that of the loss's weight."""
    columns = [(each.shares(ROWS), each.pull(ROWS) / each.pull(ROWS).sum()) for each in drawn.values()]
    return [
        [f"{index / ROWS:.1f} .. {(index + 1) / ROWS:.1f}"]
        + [f"{100 * share[index]:.1f} %" for pair in columns for share in pair]
        for index in reversed(range(ROWS))
    ]


@shared("config", "set", "json", "debug")
@click.command("timesteps", help=HELP, context_settings={"show_default": True})
@click.option("--draws", type=click.IntRange(100, 1_000_000), default=10_000, help="Steps to draw for.")
@click.option("--output", "-o", type=PATH, default=Path("timesteps.png"), help="Where the histogram goes.")
def COMMAND(config: Path, assignments: tuple[str, ...], draws: int, output: Path, *, json: bool) -> int:
    """Be the `timesteps` command."""
    from stages.console.histogram import timesteps_chart

    started = time.monotonic()
    settings = load_config(config, assignments)
    kind = str(settings.train.timesteps.__struct_config__.tag)
    drawn = {f"{size_px} px": drawn_at(settings, size_px, draws) for size_px in sizes_px(settings)}
    timesteps_chart(drawn, kind, output)
    header = ["t (1 is noise)", *(part for name in drawn for part in (f"draws, {name}", f"weight, {name}"))]
    messages.table(f"Timesteps: {kind}", header, rows(drawn))
    messages.say(f"the histogram: {output}")
    if json:
        result = Result(
            stage="timesteps",
            status="built",
            key=None,
            path=str(output.absolute()),
            digest=None,
            counts={"draws": draws},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
