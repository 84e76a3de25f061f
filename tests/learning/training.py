"""LoRAs trained by the project's own stages, as the demo trains its own: pipelines/demo.toml, one thing changed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from tests.stages.project import Project

PIPELINES = Path(__file__).parents[2] / "pipelines"
ENCODING = ("validate", "encode-latents", "encode-text")
# No pictures and no checkpoints on the way: neither changes a bit of the LoRA.
QUIET = ("preview.during_training=false", "train.checkpoint_every=100000")
# Two pictures kept from training, looked at with fixed noise at the start and every so often.
VALIDATED = ("train.validation.pictures=2", "train.validation.every=50")

Sets = tuple[str, ...]


@dataclass(frozen=True)
class Trained:
    """What came of a training: the exit code, the LoRA it left, the losses of its steps and of held-out pictures."""

    code: int
    lora: Path
    ema: Path
    losses: list[float]
    validation: list[float]

    @property
    def mean_loss(self) -> float:
        return float(np.mean(self.losses))


def demo(root: Path) -> Project:
    """Return the demo in a folder of its own, with nothing made yet."""
    shutil.copytree(PIPELINES, root)
    return Project(root, "demo")


def trained(project: Project, sets: Sets = ()) -> Trained:
    """Train in `project`, whose latents and texts are encoded."""
    ran = project.run("train", sets=(*QUIET, *sets))
    path = project.results / "metrics.jsonl"
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
    return Trained(
        code=ran.code,
        lora=project.lora,
        ema=project.results / "demo_ema.safetensors",
        losses=[line["loss"] for line in lines if "loss" in line],
        validation=[line["validation_loss"] for line in lines if "validation_loss" in line],
    )
