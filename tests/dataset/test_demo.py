"""The demo's own pictures: whole, small, exactly what their script draws, and nothing that is judged afterwards."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.validate import Validate
from stages.dataset.items import build_items
from stages.flux2 import backend
from stages.world.outlines import BASE
from stages.world.scenes import COLOURS, PLACES, held_out

DEMO = Path(__file__).parents[2] / "pipelines" / "demo"
SCRIPT = runpy.run_path(str(DEMO / "draw.py"))
FOLDERS = {"zorb": SCRIPT["ZORBS"], "shapes": SCRIPT["SHAPES"]}


@pytest.mark.parametrize("name", FOLDERS)
def test_demo_pictures_are_what_the_script_draws(name: str) -> None:
    backend.prepare()
    drawn = SCRIPT["pictures"](FOLDERS[name])
    assert len(drawn) == len(list((DEMO / name).glob("*.png"))) == 12
    for number, picture in enumerate(drawn, 1):
        # Pixels, not bytes: compressors differ between systems. One level: so do devices' roundings.
        with Image.open(DEMO / name / f"{number:02}.png") as stored:
            assert np.abs(np.asarray(stored).astype(int) - picture).max() <= 1


@pytest.mark.parametrize("name", FOLDERS)
def test_demo_captions_are_what_the_script_says(name: str) -> None:
    stored = [path.read_text() for path in sorted((DEMO / name).glob("*.txt"))]
    said = SCRIPT["captions"](FOLDERS[name], SCRIPT["SHORT_EVERY"] if name == "zorb" else len(stored) + 1)
    assert stored == [f"{caption}\n" for caption in said]


def test_demo_is_accepted_whole_and_shares_one_bucket() -> None:
    config = Validate(dataset=".", class_dataset=".", trigger="zorb", resolutions=(128,))
    dataset = build_items(DEMO / "zorb", config, 64, lambda _done, _total: None, DEMO / "shapes")
    assert (dataset.faults, dataset.warnings) == ([], [])
    assert dataset.statistics.buckets == {"128x128": 24}
    assert sum(" zorb" in caption for caption in dataset.captions.values()) == 12


def test_demo_trains_nothing_that_is_judged_afterwards() -> None:
    names = [list(BASE), list(COLOURS), list(PLACES)]
    for _, colour, shape, place, *_ in SCRIPT["SHAPES"]:
        assert not held_out()[
            tuple(words.index(word) for words, word in zip(names, (shape, colour, place), strict=True))
        ]


def test_demo_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 100_000
