"""The demo's own pictures: whole, small, and exactly what their script draws."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.validate import Validate
from stages.dataset.items import build_items
from stages.flux2 import backend

DEMO = Path(__file__).parents[2] / "pipelines" / "demo"
SCRIPT = runpy.run_path(str(DEMO / "draw.py"))


def test_demo_pictures_are_what_the_script_draws() -> None:
    backend.prepare()
    drawn = SCRIPT["pictures"]()
    assert len(drawn) == len(list(DEMO.glob("*.png"))) == 12
    for number, picture in enumerate(drawn, 1):
        # Pixels, not bytes: compressors differ between systems. One level: so do devices' roundings.
        with Image.open(DEMO / f"{number:02}.png") as stored:
            assert np.abs(np.asarray(stored).astype(int) - picture).max() <= 1


def test_demo_captions_are_what_the_script_says() -> None:
    stored = [path.read_text() for path in sorted(DEMO.glob("*.txt"))]
    assert stored == [f"{caption}\n" for caption in SCRIPT["captions"]()]


def test_demo_is_accepted_whole_and_shares_one_bucket() -> None:
    config = Validate(dataset=".", trigger="zorb", resolutions=(128,))
    dataset = build_items(DEMO, config, 64, lambda _done, _total: None)
    assert (dataset.faults, dataset.warnings) == ([], [])
    assert dataset.statistics.buckets == {"128x128": 12}
    assert all(" zorb " in caption for caption in dataset.captions.values())


def test_demo_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 100_000
