"""The demo with one thing changed: it must teach as much and keep as much as the demo itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from stages.world.outlines import BASE
from stages.world.render import render, to_bytes
from stages.world.scenes import DOTTED, GRADIENT, PLAIN, STRIPED, draw_things, scenes_of
from tests.bars import Measured
from tests.learning import style
from tests.learning.conftest import Teach
from tests.learning.judging import lora_figures, missed_by_lora, said
from tests.learning.studio import SIZE, WORD, Drawing, Studio
from tests.learning.training import ENCODING, Sets, demo, trained

SEEDS = 32
# The base keeps its plain grounds where the demo's keeps its circles.
STYLE = ('validate.dataset="style"', 'train.preservation.class_word="plain"')


@dataclass(frozen=True)
class Variation:
    """Settings that differ from the demo's, and how it is drawn afterwards."""

    sets: Sets = ()
    drawings: tuple[Drawing, ...] = (Drawing(),)
    ema: bool = False


VARIATIONS = {
    "EMA": Variation(("train.ema.decay=0.95",), ema=True),
    "DoRA": Variation(('train.adapter.kind="dora"',)),
    "8 bits": Variation(('model.quantize="8bit"',), (Drawing(quantize="8bit"),)),
    "4 bits": Variation(('model.quantize="4bit"',), (Drawing(quantize="4bit"),)),
    "caption dropout": Variation(("train.caption_dropout=0.1",)),
    "guidance": Variation(drawings=(Drawing(guidance=1.0), Drawing(guidance=5.0))),
    "resolutions": Variation(("validate.resolutions=[96, 128]",), (Drawing(size=96), Drawing(size=128))),
}


@pytest.mark.full
@pytest.mark.bar("L4")
@pytest.mark.parametrize("name", VARIATIONS)
def test_variation_teaches_the_word_and_keeps_the_rest(
    name: str, studio: Studio, teach: Teach, shape: str, measured: Measured
) -> None:
    variation = VARIATIONS[name]
    taught = teach(variation.sets)
    missed = []
    for drawing in variation.drawings:
        how = replace(drawing, lora=taught.ema if variation.ema else taught.lora)
        new, kept = studio.new_score(shape, SEEDS, how).shape, studio.base_score(SEEDS, how)
        measured("L4", f"{name}, {how.size} px at guidance {how.guidance}: {said(lora_figures(new, kept))}")
        missed.append(missed_by_lora(new, kept))
    assert not any(missed)


def test_style_is_told_from_every_texture_of_the_world() -> None:
    things = draw_things(np.random.default_rng(3), 24)
    for texture in (PLAIN, STRIPED, DOTTED, GRADIENT):
        scenes = scenes_of(things._replace(texture=np.full(24, texture)), BASE, np.random.default_rng(4))
        pictures = np.array(to_bytes(render(scenes, SIZE, SIZE)))
        found = [style.shows(*each) for each in zip(pictures, things.ground, strict=True)]
        assert found == [texture == GRADIENT] * 24


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
