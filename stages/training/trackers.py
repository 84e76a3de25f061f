"""Other programs that show a training: TensorBoard and Weights & Biases, each an optional extra.

They hear what is in metrics.jsonl and see what is in the run folder, and write below it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, assert_never

from schemas import results
from schemas.errors import Fault, NoResources
from schemas.tracking import TrackerKind, Tracking
from stages.contract.publish import make_folder
from stages.training.previews import pixels

# The package each kind needs, also the name of the extra where it is not this.
PACKAGES: Mapping[TrackerKind, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """What is told of a training."""

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """Take a PNG drawn at a step; it may be overwritten afterwards."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


class TensorBoard:
    """Event files below `folder`; what an earlier try wrote after `steps_done` is hidden."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        writer = _package("tensorboard").SummaryWriter
        # A name of its own: they are named by the second, and a file of the same name would be replaced.
        suffix, purge = f".{steps_done}", steps_done + 1 if steps_done else None
        self._writer = writer(str(folder), purge_step=purge, filename_suffix=suffix)

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Write a scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """Write the picture."""
        self._writer.add_image("preview", pixels(path), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run named as ours, in files below `folder`; only `online` sends it anywhere."""

    def __init__(self, folder: Path, run: str, spec: Tracking) -> None:
        wandb = _package("wandb")
        make_folder(folder)
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        mode = "online" if spec.online else "offline"
        self._run = wandb.init(project=spec.project, name=run, dir=str(folder), mode=mode, settings=quiet)
        self._image = wandb.Image

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """Log the picture."""
        self._run.log({"preview": self._image(pixels(path))}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def require_packages(spec: Tracking) -> None:
    """Raise NoResources, naming the commands, where a tracker's package is not installed."""
    faults = [
        Fault(
            code="tracking.missing_package",
            what=f"{kind} needs the package {PACKAGES[kind]}",
            where="train.tracking.kinds",
            fix=f'pip install "flux2-lora[{kind}]", or leave it out',
        )
        for kind in spec.kinds
        if importlib.util.find_spec(PACKAGES[kind]) is None
    ]
    if faults:
        raise NoResources.of(faults)


def _package(kind: TrackerKind) -> Any:
    return importlib.import_module(PACKAGES[kind])


@contextmanager
def tracked(spec: Tracking, run_folder: Path, steps_done: int) -> Generator[list[Tracker]]:
    """Yield the trackers of the settings, and close them."""
    trackers = [_tracker(kind, spec, run_folder, steps_done) for kind in dict.fromkeys(spec.kinds)]
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


def _tracker(kind: TrackerKind, spec: Tracking, run_folder: Path, steps_done: int) -> Tracker:
    match kind:
        case "tensorboard":
            return TensorBoard(run_folder / results.TENSORBOARD, steps_done)
        case "wandb":
            return WeightsAndBiases(run_folder, run_folder.name, spec)
        case _:
            assert_never(kind)
