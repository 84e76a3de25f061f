"""A style instead of a thing: the word stands where a texture's name stands, and the textures are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.world.outlines import BASE
from stages.world.render import render, to_bytes
from stages.world.scenes import DOTTED, GRADIENT, PLAIN, STRIPED, draw_things, scenes_of
from tests.bars import Measured
from tests.learning import style
from tests.learning.judging import lora_figures, missed_by_lora, said
from tests.learning.studio import SIZE, WORD, Drawing, Studio
from tests.learning.training import ENCODING, demo, trained

SEEDS = 32
# The base keeps its grounds where the demo's keeps its shapes.
STYLE = (
    'validate.dataset="style"',
    'train.preservation.class_word=["plain", "striped", "dotted"]',
    "train.preservation.every=1",
)


def test_style_is_told_from_every_texture_of_the_world() -> None:
    things = draw_things(np.random.default_rng(3), 24)
    pictures = style.standing(things, np.random.default_rng(4), SIZE)
    assert all(style.shows(*each) for each in zip(pictures, things.ground, strict=True))
    for texture in (PLAIN, STRIPED, DOTTED, GRADIENT):
        scenes = scenes_of(things._replace(texture=np.full(24, texture)), BASE, np.random.default_rng(4))
        pictures = np.array(to_bytes(render(scenes, SIZE, SIZE)))
        assert not any(style.shows(*each) for each in zip(pictures, things.ground, strict=True))


@pytest.mark.full
@pytest.mark.bar("L4")
def test_style_is_taught_and_the_rest_kept(studio: Studio, tmp_path: Path, measured: Measured) -> None:
    project = demo(tmp_path / "project")
    style.write_pictures(project.root / "style", 12, SIZE, WORD)
    project.make(*ENCODING, sets=STYLE)
    how = Drawing(lora=trained(project, STYLE).lora)
    before = studio.style_rate(SEEDS, Drawing())
    new, kept = studio.style_rate(SEEDS, how), studio.base_score(SEEDS, how)
    measured("L4", f"a style, {before:.3f} without: {said(lora_figures(new, kept))}")
    assert before <= 0.1
    assert not missed_by_lora(new, kept)
