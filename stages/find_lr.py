"""find-lr: try rising learning rates on the cached latents, and suggest the one to train with.

Nothing is kept but the chart: what is trained here is thrown away, and the run folder is not touched.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from schemas.errors import BadConfig
from schemas.manifest import Result
from schemas.optimizers import Prodigy
from schemas.schedules import Rising
from schemas.train import Train
from stages.console import messages
from stages.console.invocation import PATH, job_of, places, shared
from stages.contract.job import Job
from stages.contract.places import require_writable
from stages.contract.publish import write_file
from stages.contract.runner import reading

if TYPE_CHECKING:
    from stages.training.sweep import Found, Sweep

RATE = click.FloatRange(0, 1, min_open=True)
# Around the optimizer's own rate.
BELOW, ABOVE = 1e-2, 1e3

HELP = """Train a while with a rising learning rate, draw the loss over it, and suggest the rate to train with.

It reads what encode-latents and encode-text made; what it trains is thrown away.

\b
Example:
  flux2-lora find-lr --config pipelines/demo.toml
"""


class SweepResult(Result, frozen=True, kw_only=True, omit_defaults=True):
    """What `--json` prints: the rate to take, where the loss fell fastest, where it rose above its start again."""

    learning_rate: float
    steepest: float
    diverged: float | None


def rising(settings: Train, steps: int, lowest: float | None, highest: float | None) -> Train:
    """Return the settings of a sweep from `lowest` to `highest`, by default around the optimizer's own rate.

    Raises BadConfig for rates that do not rise, and for an optimizer that finds its rate itself.
    """
    if isinstance(settings.optimizer, Prodigy):
        what = "prodigy estimates its own step size: there is no rate to find"
        raise BadConfig("find_lr.prodigy", what, where="train.optimizer", fix="keep train.learning_rate = 1.0")
    own = settings.optimizer.default_rate
    low, high = lowest or own * BELOW, min(highest or own * ABOVE, 1.0)
    if low >= high:
        why = f"--lowest is {low}, --highest {high}"
        raise BadConfig("find_lr.range", "the rates do not rise", why=why, fix="give a --lowest below --highest")
    return msgspec.structs.replace(
        settings,
        steps=steps,
        learning_rate=high,
        schedule=Rising(min_ratio=low / high),
        checkpoint_every=steps,
        ema=None,
        rotation=None,
    )


def sweep(job: Job, settings: Train) -> Sweep:
    """Train through the rising rates. Raises Stale when the encoders have not run."""
    from stages.console.progress import Measures, progress
    from stages.flux2.backend import prepare
    from stages.flux2.identity import model_of
    from stages.lora.init_lora import ROLE, init_lora_inputs
    from stages.lora.targets import sizes
    from stages.training.sources import make_trainer, training_data, validator
    from stages.training.sweep import MEASURED, MEASURED_ITEMS, Sweep
    from stages.training.validation import Validator

    backend = prepare()
    messages.say(backend.line())
    sizes(model_of(job).variant.transformer, settings)
    data = training_data(job)
    trainer = make_trainer(job, settings, backend.compute_dtype, init_lora_inputs(job).get(ROLE))
    measure = validator(job) or Validator(data, sorted(data.items)[:MEASURED_ITEMS], MEASURED)
    taken = Sweep(trainer, data, measure)
    with progress("find-lr", total=settings.steps, quiet=job.flags.quiet) as bar:

        def on_step(rate: float, loss: float) -> None:
            bar.measure(Measures(loss, rate))
            bar.advance(1)

        taken.run(settings, job.config.run.seed, on_step)
    return taken


@places
@shared("json", "quiet", "debug")
@click.command("find-lr", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.option("--lowest", type=RATE, help="Rate of the first step; by default a hundredth of the optimizer's own.")
@click.option("--highest", type=RATE, help="Rate of the last step; by default 1000 times the optimizer's own.")
@click.option("--steps", type=click.IntRange(10, 10_000), default=100, help="Steps to take at most.")
@click.option("--output", "-o", type=PATH, default=Path("find-lr.png"), help="Where the chart goes.")
def COMMAND(**options: Any) -> int:
    """Be the `find-lr` command."""
    from stages.training.sweep import found

    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    job = job_of(options)
    settings = rising(job.config.train, options["steps"], options["lowest"], options["highest"])
    job.config = msgspec.structs.replace(job.config, train=settings)
    require_writable(options["output"].parent)
    with reading(job):
        taken = sweep(job, settings)
    judged = found(taken.rates, taken.losses, taken.start)
    _draw(taken, judged, options["output"])
    messages.say(f"suggested: --set train.learning_rate={judged.suggested:g}")
    messages.say(f"the loss fell fastest at {judged.steepest:.1e}; chart: {options['output']}")
    if options["json"]:
        result = SweepResult(
            stage="find-lr",
            status="built",
            key=None,
            path=str(options["output"].absolute()),
            digest=None,
            counts={"steps": len(taken.rates)},
            seconds=round(time.monotonic() - started, 3),
            error=None,
            learning_rate=judged.suggested,
            steepest=judged.steepest,
            diverged=judged.diverged,
        )
        messages.result(msgspec.json.encode(result))
    return 0


def _draw(taken: Sweep, judged: Found, path: Path) -> None:
    from stages.console.sweep import sweep_chart
    from stages.training.sweep import smoothed

    curves = (taken.losses, smoothed(taken.losses).tolist())
    write_file(path, sweep_chart(taken.rates, curves, judged.suggested))
