"""What the built-in model draws of things it never saw, as it is and with drawing broken on purpose."""

from __future__ import annotations

import pytest

from tests.bars import Count, Measured
from tests.learning import breaks
from tests.learning.judging import base_figures, missed_by_base, said
from tests.learning.studio import Drawing, Studio


@pytest.mark.bar("L1")
def test_captions_are_followed(studio: Studio, count: Count, measured: Measured) -> None:
    prompts = count(12, 64)
    score = studio.base_score(prompts, Drawing())
    measured("L1", f"{prompts} prompts: {said(base_figures(score))}")
    assert not missed_by_base(score)


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
