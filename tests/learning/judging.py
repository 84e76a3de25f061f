"""Figures against bars: which are missed, and how a figure is said."""

from __future__ import annotations

from stages.world.judge import Score
from tests.learning.bars import ALL, KEPT_ALL, KEPT_COLOUR, NEW, PART
from tests.learning.training import Trained

Figures = dict[str, float]
Band = tuple[float, float]


def said(figures: Figures) -> str:
    """Return figures as the table shows them."""
    return ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items())


def base_figures(score: Score) -> Figures:
    """Return what the base is judged by."""
    return {"all": score.all, "colour": score.colour, "position": score.place, "background": score.ground}


def missed_by_base(score: Score) -> Figures:
    """Return the figures that miss L1."""
    return {name: figure for name, figure in base_figures(score).items() if figure < (ALL if name == "all" else PART)}


def lora_figures(new: float, kept: Score) -> Figures:
    """Return what a LoRA is judged by: the share that shows the new thing, and what it kept of the base."""
    return {"new": new, "kept all": kept.all, "kept colour": kept.colour}


def missed_by_lora(new: float, kept: Score) -> Figures:
    """Return the figures that miss L2."""
    least = (NEW, KEPT_ALL, KEPT_COLOUR)
    figures = lora_figures(new, kept)
    return {name: figure for (name, figure), bar in zip(figures.items(), least, strict=True) if figure < bar}


def outside(trained: Trained, training: Band, validation: Band) -> Figures:
    """Return the losses that miss L3."""
    losses = {"training loss": (trained.mean_loss, training), "validation loss": (trained.validation[-1], validation)}
    return {name: loss for name, (loss, (low, high)) in losses.items() if not low <= loss <= high}
