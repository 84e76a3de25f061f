"""What the demo's own LoRA teaches the built-in model, in shares of pictures that are right."""

from __future__ import annotations

import pytest

from tests.bars import Count, Measured
from tests.learning.conftest import Teach
from tests.learning.judging import base_figures, lora_figures, missed_by_lora, said
from tests.learning.studio import Drawing, Studio


@pytest.mark.bar("L2")
def test_demo_teaches_its_word_and_keeps_the_rest(
    studio: Studio, teach: Teach, shape: str, count: Count, measured: Measured
) -> None:
    seeds, how = count(10, 32), Drawing(lora=teach(()).lora)
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
