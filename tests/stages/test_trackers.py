"""Trackers: TensorBoard's files hold the metrics and pictures; nothing of them reaches a key or the LoRA."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.tracking import Tracking
from stages.stores.tensors import load, tensor_digest
from stages.training import trackers
from tests.stages.project import Project

TENSORBOARD = 'train.tracking.kinds=["tensorboard"]'
WANDB = 'train.tracking.kinds=["wandb"]'
NO_PICTURES = "preview.during_training=false"


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def told(project: Project) -> list[tuple[int, Any]]:
    """Return (step, value) of everything in the event files."""
    from tensorboardX.proto.event_pb2 import Event

    files = sorted((project.results / "tensorboard").glob("events.*"))
    events = [Event.FromString(record) for path in files for record in records(path.read_bytes())]
    return [(event.step, value) for event in events for value in event.summary.value]


def records(data: bytes) -> Iterator[bytes]:
    """Yield a TFRecord file's records: length, checksum of it, that many bytes, checksum of them."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


@needs("tensorboardX")
def test_tensorboard_hears_every_line_and_sees_every_picture(untrained: Project, finished: Project) -> None:
    untrained.make("train", sets=(TENSORBOARD, "train.validation.every=2", "train.validation.pictures=1"))
    values = told(untrained)
    for line in map(msgspec.json.decode, (untrained.results / "metrics.jsonl").read_bytes().splitlines()):
        heard = {value.tag: value.simple_value for step, value in values if step == line["step"]}
        for name in set(line) - {"step"}:
            assert heard[name] == pytest.approx(line[name], rel=1e-6)
    pictures = [(step, value.image) for step, value in values if value.tag == "preview"]
    assert [step for step, _ in pictures] == [0, 2, 4]
    assert all((image.height, image.width) == (32, 32) for _, image in pictures)


@needs("tensorboardX")
def test_tracking_changes_no_key_and_no_bit(untrained: Project, finished: Project) -> None:
    untrained.make("train", sets=(TENSORBOARD, NO_PICTURES))
    assert tensor_digest(load(untrained.lora).tensors) == tensor_digest(load(finished.lora).tensors)
    assert untrained.run("train", sets=(NO_PICTURES,)).status == "up to date"


@needs("tensorboardX")
def test_resumed_training_hears_only_its_own_steps(untrained: Project) -> None:
    untrained.make("train", sets=(TENSORBOARD, NO_PICTURES, "train.steps=2"))
    untrained.make("train", sets=(TENSORBOARD, NO_PICTURES))
    assert [step for step, value in told(untrained) if value.tag == "loss"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("setting", "kind"), [(TENSORBOARD, "tensorboard"), (WANDB, "wandb")])
def test_missing_package_is_named_before_training(untrained: Project, setting: str, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "PACKAGES", {"tensorboard": "no_such_package", "wandb": "no_such_package"})
        refused = untrained.run("train", sets=(setting,))
    assert (refused.code, refused.error) == (7, "tracking.missing_package")
    assert f'pip install "flux2-lora[{kind}]"' in refused.result["error"]["fix"]
    assert not (untrained.store / "checkpoints").exists()


def test_unknown_tracker_is_refused(untrained: Project) -> None:
    refused = untrained.run("train", sets=('train.tracking.kinds=["comet"]',))
    assert (refused.code, refused.error) == (2, "config.wrong_value")


@needs("wandb")
@pytest.mark.slow
def test_weights_and_biases_stays_on_this_machine(untrained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    untrained.make("train", sets=(WANDB,))
    runs = list(Path(untrained.results / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_weights_and_biases_is_told_the_project_and_whether_to_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    heard: dict[str, object] = {}
    package = types.ModuleType("wandb")
    vars(package).update(Settings=lambda **_: None, Image=None, init=lambda **arguments: heard.update(arguments))
    monkeypatch.setitem(sys.modules, "wandb", package)
    trackers.WeightsAndBiases(
        tmp_path / "run", "blue-cat", Tracking(kinds=("wandb",), project="cats", online=mode == "online")
    )
    assert (heard["project"], heard["name"], heard["mode"]) == ("cats", "blue-cat", mode)
