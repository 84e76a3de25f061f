"""Before the model is loaded: how much room the checkpoints to come will take."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from schemas.ema import Ema
from schemas.errors import NoResources
from schemas.resolutions import Phase
from schemas.rotation import Rotation
from schemas.run import Config
from schemas.schedules import Constant, Cosine
from schemas.train import Train
from schemas.validate import Validate
from schemas.validation import Validation
from stages.contract.job import Job
from stages.training.memory import Sizes
from stages.training.preflight import beyond_the_end, needs, require_disk

SIZES = Sizes(state=3000, factors=1000, file=500)
TRAIN = Train(steps=1000, checkpoint_every=100)
STEPS_BYTES = 240 * 1000


def job(folder: Path) -> Job:
    return Job(
        config=Config(validate=Validate(dataset=".")),
        config_path=folder / "a.toml",
        store=folder / "store",
        runs=folder / "runs",
    )


@pytest.mark.parametrize(
    ("changes", "done", "count"),
    [
        ({}, 0, 10),
        ({}, 950, 1),
        ({}, 1000, 0),
        ({"steps": 1050}, 0, 11),
        ({"steps": 50}, 0, 1),
        ({"rotation": Rotation()}, 0, 10),
        ({"rotation": Rotation(keep_last=2)}, 0, 4),
        ({"rotation": Rotation(keep_last=2, keep_best=False)}, 0, 3),
        ({"rotation": Rotation(keep_last=2, keep_every=500, pin=(300,))}, 0, 7),
        ({"rotation": Rotation(keep_last=100)}, 0, 10),
    ],
)
def test_checkpoints_to_come_are_counted(changes: dict[str, object], done: int, count: int) -> None:
    settings = msgspec.structs.replace(TRAIN, **changes)
    each = 3000 + 500 + 240 * settings.steps
    assert needs(settings, SIZES, done) == (count * each + 500, count * 500 + 500)


def test_moving_average_is_a_second_file() -> None:
    store, _ = needs(msgspec.structs.replace(TRAIN, ema=Ema()), SIZES, 0)
    assert store == 10 * (3000 + 1000 + STEPS_BYTES) + 1000


def test_limit_in_gigabytes_bounds_the_store() -> None:
    store, _ = needs(msgspec.structs.replace(TRAIN, rotation=Rotation(max_gigabytes=0.0001)), SIZES, 0)
    assert store == 100_000 + 3000 + 500 + 500


def test_need_beyond_what_is_free_is_refused_with_both_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_disk(job(tmp_path), (10**6, 10**6))
    with pytest.raises(NoResources) as refused:
        require_disk(job(tmp_path), (free // 2 + 10**9, free // 2 + 10**9))
    fault = refused.value.faults[0]
    assert fault.code == "disk.full"
    assert fault.what.startswith(f"need about {(free + 2 * 10**9) / 1e6:.1f} MB, ")
    assert "train.rotation.keep_last" in fault.fix


@pytest.mark.parametrize("place", ["runs", "store", "store/checkpoints"])
def test_place_that_is_a_file_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("")
    with pytest.raises(NoResources) as refused:
        require_disk(job(tmp_path), (0, 0))
    assert refused.value.faults[0].code == "disk.in_the_way"


PHASES = (Phase(sizes=(256,), until=500), Phase(sizes=(512,), until=1000), Phase(sizes=(768,)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"schedule": Cosine(warmup_steps=1000)}, []),
        ({"schedule": Constant(warmup_steps=4000)}, ["ends at 25 % of train.learning_rate"]),
        ({"resolutions": (*PHASES[:1], *PHASES[2:])}, []),
        ({"resolutions": PHASES}, ["an until of 1000: what follows it (768) is never trained"]),
        ({"validation": Validation(every=1000)}, []),
        ({"validation": Validation(every=1001)}, ["the loss is measured once, before training"]),
    ],
)
def test_what_is_asked_for_after_the_last_step_is_said(changes: dict[str, object], said: list[str]) -> None:
    lines = beyond_the_end(msgspec.structs.replace(TRAIN, **changes))
    assert len(lines) == len(said)
    assert all(
        words in line and line.endswith("as train.steps is 1000") for line, words in zip(lines, said, strict=True)
    )
