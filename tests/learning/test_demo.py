"""What the built-in model draws, and what the demo's own LoRA teaches it, in shares of pictures that are right."""

from __future__ import annotations

import pytest

from tests.bars import Count, Measured
from tests.learning import breaks
from tests.learning.conftest import Teach
from tests.learning.judging import base_figures, lora_figures, missed_by_base, missed_by_lora, said
from tests.learning.studio import Drawing, Studio


@pytest.mark.bar("L1")
def test_captions_are_followed(studio: Studio, count: Count, measured: Measured) -> None:
    prompts = count(12, 64)
    score = studio.base_score(prompts, Drawing())
    measured("L1", f"{prompts} prompts: {said(base_figures(score))}")
    assert not missed_by_base(score)


@pytest.mark.bar("L2")
def test_demo_teaches_its_word_and_keeps_the_rest(
    studio: Studio, teach: Teach, shape: str, count: Count, measured: Measured
) -> None:
    seeds, how = count(14, 32), Drawing(lora=teach(()).lora)
    new, kept = studio.new_score(shape, seeds, how), studio.base_score(seeds, how)
    measured("L2", f"{seeds} seeds, {shape}: {said(lora_figures(new.shape, kept))}")
    measured("L2", f"the new thing's words: {said(base_figures(new))}")
    assert not missed_by_lora(new.shape, kept)


@pytest.mark.full
@pytest.mark.bar("L2")
def test_the_word_means_nothing_without_the_lora(studio: Studio, shape: str, measured: Measured) -> None:
    new = studio.new_score(shape, 32, Drawing())
    measured("L2", f"without the LoRA: new {new.shape:.3f}")
    assert new.shape <= 0.1


@pytest.mark.full
@pytest.mark.bar("L5")
@pytest.mark.parametrize("name", breaks.DRAWING)
def test_broken_drawing_misses_a_bar(
    name: str, studio: Studio, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    breaks.DRAWING[name](monkeypatch)
    # Texts are read again: half of these break that.
    score = Studio(studio.folder).base_score(16, Drawing())
    measured("L5", f"{name}: {said(base_figures(score))}")
    assert missed_by_base(score)
