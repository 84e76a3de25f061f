"""What the files in `runs/<run>/` are called: the names people and other programs rely on."""

from __future__ import annotations

from typing import Literal

METRICS = "metrics.jsonl"
CURVES = "training_curves.png"
PREVIEWS = "previews.png"
VERIFY = "verify.json"
TRACE = "trace.json"
REPORT = "report.html"
COMPARISON = "compare.html"
TENSORBOARD = "tensorboard"
TRAJECTORY = "trajectory.json"
MODEL = "model.json"
LATEST_PREVIEW = "preview_latest.png"
# Only while a training is under way.
CONTROL_LOCK = ".control.lock"
CONTROL_REQUEST = "control.json"
CONTROL_ANSWER = "control_answer.json"


def lora(run: str) -> str:
    """Return the name of the finished LoRA."""
    return f"{run}.safetensors"


def ema(run: str) -> str:
    """Return the name of the moving average of the LoRA."""
    return f"{run}_ema.safetensors"


def checkpoint(step: int | Literal["*"]) -> str:
    """Return the name of the LoRA as it was after `step` steps, or the pattern of all such names."""
    return f"checkpoint_{step}.safetensors"


def preview(step: int) -> str:
    """Return the name of a step's picture, or of the grid where there are several."""
    return f"preview_{step}.png"


def previews(step: int, count: int) -> list[str]:
    """Return the names of the single pictures of a step's `count` prompts."""
    return [preview(step)] if count == 1 else [f"preview_{step}_{number}.png" for number in range(1, count + 1)]
