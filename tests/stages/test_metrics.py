"""Metrics: every step once in the file and in the checkpoints, however little of them is in memory."""

from __future__ import annotations

import json

import pytest

from stages.training.loop import Line
from stages.training.recorder import Recorder
from tests.stages.project import Project

SETS = ("train.steps=8", "train.checkpoint_every=2", "preview.during_training=false")


def test_lines_are_held_no_longer_than_until_the_next_checkpoint(
    untrained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    append = Recorder.line

    def line(recorder: Recorder, line: Line) -> None:
        append(recorder, line)
        held.append(len(recorder._recent))

    monkeypatch.setattr(Recorder, "line", line)
    untrained.make("train", sets=SETS)
    assert held == [1, 2] * 4
    lines = [json.loads(line) for line in (untrained.results / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize(("batch", "warned"), [(2, False), (8, True)])
def test_step_of_more_items_than_there_are_is_warned_of(untrained: Project, batch: int, *, warned: bool) -> None:
    ran = untrained.run("train", sets=(f"train.batch_size={batch}", "train.gradient_accumulation=2", *SETS[::2]))
    assert ("or repeats some" in ran.stderr) == warned
