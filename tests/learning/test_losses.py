"""Losses of healthy trainings lie in bands; a broken training misses a band, the new thing or the base.

The bands hold for the demo with two pictures kept from training; they were measured with seeds 42, 1 and 2.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bars import Measured
from tests.learning import breaks
from tests.learning.conftest import Teach
from tests.learning.judging import Band, lora_figures, missed_by_lora, outside, said
from tests.learning.studio import Drawing, Studio
from tests.learning.training import ENCODING, VALIDATED, Trained, demo, trained
from tests.stages.project import Project

SEEDS = (42, 1, 2)
TRAINING: Band = (0.038, 0.07)  # mean over the run; measured 0.048 to 0.053
VALIDATION: Band = (0.06, 0.12)  # after the last step; measured 0.085 to 0.090
START: Band = (0.05, 0.5)  # of the validation loss before the first step; measured 0.165, broken 4.5 to 50
NO_PROGRESS = 8  # the exit code of a training that learnt nothing


@pytest.mark.full
@pytest.mark.bar("L3")
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_lie_in_their_bands_whatever_the_seed(seed: int, teach: Teach, measured: Measured) -> None:
    taught = teach((*VALIDATED, f"run.seed={seed}"))
    said_ = f"training {taught.mean_loss:.4f}, validation {' '.join(f'{loss:.4f}' for loss in taught.validation)}"
    measured("L3", f"seed {seed}: {said_}")
    assert not outside(taught, TRAINING, VALIDATION)


def begun(project: Project) -> Trained:
    """Train one step, after a look at the held-out pictures."""
    return trained(project, (*VALIDATED, "train.steps=1"))


@pytest.mark.bar("L3")
def test_bare_model_starts_in_its_band(encoded: Project, tmp_path: Path, measured: Measured) -> None:
    [start] = begun(encoded.copy(tmp_path / "project")).validation
    measured("L3", f"validation loss of the bare model {start:.4f}")
    assert START[0] <= start <= START[1]


@pytest.mark.bar("L6")
@pytest.mark.parametrize("name", breaks.TRAINING)
def test_broken_training_shows_at_once(
    name: str, encoded: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    project = encoded.copy(tmp_path / "project")
    breaks.TRAINING[name](monkeypatch)
    if name in breaks.ENCODING:
        assert project.run("encode-latents", "--force").code == 0
    taught = begun(project)
    [start] = taught.validation
    measured("L6", f"{name}: validation loss of the bare model {start:.3f}, exit code {taught.code}")
    assert taught.code == NO_PROGRESS or not START[0] <= start <= START[1]


@pytest.mark.full
@pytest.mark.bar("L6")
@pytest.mark.parametrize("name", breaks.TRAINING)
def test_broken_training_misses_a_bar(
    name: str, studio: Studio, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    project = demo(tmp_path / "project")
    with monkeypatch.context() as patch:
        breaks.TRAINING[name](patch)
        project.make(*ENCODING)
        taught = trained(project, VALIDATED)
    if taught.code == NO_PROGRESS:
        measured("L6", f"{name}: ended, nothing was learnt")
        return
    assert taught.code == 0
    how = Drawing(lora=taught.lora)
    new, kept = studio.new_score(shape, 16, how).shape, studio.base_score(16, how)
    losses = {"training loss": taught.mean_loss, "validation loss": taught.validation[-1]}
    missed = missed_by_lora(new, kept) | outside(taught, TRAINING, VALIDATION)
    measured("L6", f"{name}: {said(losses | lora_figures(new, kept))}; missed {', '.join(missed)}")
    assert missed
