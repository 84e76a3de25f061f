"""Which visits a training makes: repeats, and the sizes that are drawn at a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from schemas.train import Train
from stages.dataset.draws import Draw
from stages.training.data import Tables, TrainingData

# Sizes in latent cells of 16 px: 512 and 768 px of one picture, 512 px of another, a small one at its own size.
SHAPES = {"a-512": (32, 32), "a-768": (48, 48), "b-512": (24, 40), "c-own": (10, 20)}
EMPTY = {
    "embedding_key": "",
    "fragment": "",
    "row": 0,
    "tokens": 0,
    "length": 1,
    "width": 1,
    "dtype": "",
    "sha256": "",
}


def data(**times: int) -> TrainingData:
    items = [{"item_id": item, "path": item[0], "caption_id": ""} for item in SHAPES]
    draws = {item: Draw(item_id=item, picture=item, times=times.get(item[0], 1)) for item in SHAPES}
    latents: list[dict[str, Any]] = [
        {"item_id": item, "flip": flip, "latent_key": "", "fragment": "", "row": 0, "channels": 4}
        | {"height": height, "width": width, "dtype": "", "sha256": ""}
        for item, (height, width) in SHAPES.items()
        for flip in (False, True)
    ]
    return TrainingData([], Tables(items, draws, latents, [{**EMPTY, "role": "empty"}]))


def settings(*phases: dict[str, object], accumulation: int = 1) -> Train:
    return msgspec.convert({"resolutions": phases, "gradient_accumulation": accumulation}, Train)


def drawn(found: TrainingData, spec: Train, first: int, count: int) -> Counter[str]:
    order = found.order(spec, 7)
    return Counter(visit for step in range(first, first + count) for visit in order.at(step))


def test_without_phases_every_size_of_every_picture_comes_once_an_epoch() -> None:
    assert drawn(data(), settings(), 0, 4) == Counter(list(SHAPES))
    assert drawn(data(), settings(), 400, 4) == Counter(list(SHAPES))


def test_repeated_picture_has_visits_of_its_own_in_every_size() -> None:
    found = drawn(data(a=3), settings(), 0, 8)
    assert found == Counter([*SHAPES, "a-512*1", "a-512*2", "a-768*1", "a-768*2"])


def test_phase_draws_its_sizes_and_keeps_pictures_that_are_too_small() -> None:
    spec = settings({"until": 6, "sizes": [512]}, {"until": 9, "sizes": [768]}, {"sizes": [768, 512]})
    assert drawn(data(), spec, 0, 6) == Counter({"a-512": 2, "b-512": 2, "c-own": 2})
    assert drawn(data(), spec, 6, 3) == Counter(["a-768", "b-512", "c-own"])
    assert drawn(data(), spec, 9, 8) == Counter([*SHAPES, *SHAPES])


def test_phase_ends_after_optimizer_steps_whatever_the_accumulation() -> None:
    spec = settings({"until": 3, "sizes": [512]}, {"sizes": [768]}, accumulation=2)
    assert drawn(data(), spec, 0, 6)["a-768"] == 0
    assert drawn(data(), spec, 6, 6) == Counter({"a-768": 2, "b-512": 2, "c-own": 2})


@pytest.mark.parametrize(
    "phases",
    [
        [{"until": 5, "sizes": [512]}],
        [{"sizes": [512]}, {"sizes": [768]}],
        [{"until": 5, "sizes": [512]}, {"until": 5, "sizes": [768]}, {"sizes": [512]}],
        [{"until": 5, "sizes": []}, {"sizes": [512]}],
    ],
)
def test_phases_that_do_not_follow_each_other_are_refused(phases: list[dict[str, object]]) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"resolutions|sizes"):
        settings(*phases)
