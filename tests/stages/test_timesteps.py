"""timesteps: what it draws is what training draws, told as a table, a picture and one object."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from schemas.run import Config
from schemas.timesteps import Shift, Uniform, Weighted
from schemas.train import Train
from schemas.validate import Validate
from stages.cli import run
from stages.timesteps import drawn_at, rows, sizes_px
from tests.stages.project import Project, new_project

CONFIG = Config(validate=Validate(dataset="", resolutions=(1024, 512)))


def with_timesteps(timesteps: Shift | Uniform | Weighted) -> Config:
    return msgspec.structs.replace(CONFIG, train=Train(timesteps=timesteps))


def test_only_a_kind_that_sees_sizes_is_drawn_for_each() -> None:
    assert sizes_px(with_timesteps(Shift())) == [512, 1024]
    assert sizes_px(with_timesteps(Uniform())) == [512]


def test_draws_are_those_of_the_kind_and_size() -> None:
    small, large = (drawn_at(with_timesteps(Shift()), size, 2000).timesteps for size in (512, 1024))
    assert np.median([small, large], axis=1) == pytest.approx([0.6525, 0.7595], abs=0.02)


def test_rows_are_shares_of_draws_and_of_the_weight() -> None:
    found = rows({"512 px": drawn_at(with_timesteps(Weighted(stratified=True)), 512, 1600)})
    assert [row[0] for row in found][:2] == ["0.9 .. 1.0", "0.8 .. 0.9"]
    often, pull = (np.array([float(row[column].removesuffix(" %")) for row in found]) for column in (1, 2))
    assert often == pytest.approx(10, abs=1.0)
    assert often.sum() == pytest.approx(100, abs=0.5)
    assert pull.sum() == pytest.approx(100, abs=0.5)
    # The bell's means over the two tenths, of a whole of 0.996.
    assert (pull / often)[[1, 9]] == pytest.approx([1.493, 0.584], abs=0.02)


def command(project: Project, assignment: str) -> int:
    places = ["--config", str(project.config), "--output", str(project.root / "levels.png")]
    return run(["timesteps", *places, "--draws", "100", "--json", "--set", assignment])


def test_the_command_leaves_a_picture_and_says_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    project = new_project(tmp_path)
    assert command(project, "train.timesteps={kind = 'content'}") == 0
    out, errors = capfd.readouterr()
    found = msgspec.json.decode(out)
    assert found["counts"] == {"draws": 100}
    assert Path(found["path"]) == project.root / "levels.png"
    assert {path.name for path in project.root.iterdir()} == {"cat.toml", "pictures", "levels.png"}
    with Image.open(found["path"]) as picture:
        assert picture.format == "PNG"
    assert "Timesteps: content" in errors


def test_a_window_never_reached_is_an_error_of_the_configuration(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    window = "train.timesteps={kind = 'logit_normal', mean = 5.0, std = 0.2, maximum = 0.1}"
    project = new_project(tmp_path)
    assert command(project, window) == 2
    assert not (project.root / "levels.png").exists()
    assert msgspec.json.decode(capfd.readouterr().out)["error"]["code"] == "timesteps.empty_window"
