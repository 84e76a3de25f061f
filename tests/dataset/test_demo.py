"""The demo's own pictures: whole, small, and exactly what their script draws."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.validate import Validate
from stages.dataset.items import build_items

DEMO = Path(__file__).parents[2] / "pipelines" / "demo"


def test_demo_pictures_are_what_the_script_draws() -> None:
    # Pixels, not bytes: compressors differ between systems.
    script = runpy.run_path(str(DEMO / "draw.py"))
    assert len(script["PICTURES"]) == 8
    for number, words in enumerate(script["PICTURES"], 1):
        with Image.open(DEMO / f"{number}.png") as stored:
            assert np.array_equal(np.asarray(stored), np.asarray(script["zorb"](*words)))


def test_demo_is_accepted_whole_and_shares_one_bucket() -> None:
    config = Validate(dataset=".", trigger="zorb", resolutions=(64,))
    dataset = build_items(DEMO, config, 64, lambda _done, _total: None)
    assert (dataset.faults, dataset.warnings) == ([], [])
    assert dataset.statistics.buckets == {"64x64": 8}
    assert all(" zorb " in caption for caption in dataset.captions.values())


def test_demo_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 200_000
