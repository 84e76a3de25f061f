"""Requests to a training: both sides of the two files, and what happens when one side is gone."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from schemas import results
from schemas.control import Action, Answer, Request
from schemas.errors import BadConfig, Stopped
from stages.training import control, loop
from stages.training.control import Control, ask
from stages.training.guards import Line
from tests.training.runs import Run


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (control, loop):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)


@contextlib.contextmanager
def paused(_: str) -> Generator[None]:
    yield


def training(folder: Path, said: list[str]) -> Control:
    return Control(folder, paused=paused, say=said.append, warn=said.append)


def silent(_: str) -> None:
    """Say nothing."""


def awaited(side: Control) -> Request:
    while True:
        if request := side.request():
            return request


class Asking(threading.Thread):
    """Somebody in another terminal."""

    def __init__(self, folder: Path, action: Action) -> None:
        super().__init__()
        self.folder = folder
        self.action: Action = action
        self.said: list[str] = []
        self.answer: Answer | BadConfig | None = None

    def run(self) -> None:
        try:
            self.answer = ask(self.folder, self.action, self.said.append)
        except BadConfig as error:
            self.answer = error


def test_request_is_answered_to_who_asked_and_to_who_watches(tmp_path: Path) -> None:
    said: list[str] = []
    with training(tmp_path, said) as side:
        asking = Asking(tmp_path, "pause")
        asking.start()
        request = awaited(side)
        side.answer(request, 7, "paused after step 7")
        asking.join()
        assert request.action == "pause"
        assert side.request() is None
    assert isinstance(asking.answer, Answer)
    assert (asking.answer.step, asking.answer.said) == (7, "paused after step 7")
    assert said == ["control: paused after step 7"]
    assert asking.said[0].startswith("asking pid ")
    assert list(tmp_path.iterdir()) == []


def test_answer_given_just_before_the_end_is_heard(tmp_path: Path) -> None:
    with training(tmp_path, []) as side:
        asking = Asking(tmp_path, "stop")
        asking.start()
        side.answer(awaited(side), 3, "stopped")
    asking.join()
    assert isinstance(asking.answer, Answer)
    assert list(tmp_path.iterdir()) == []


def test_two_who_ask_at_once_are_both_answered(tmp_path: Path) -> None:
    with training(tmp_path, []) as side:
        asking = [Asking(tmp_path, "checkpoint"), Asking(tmp_path, "preview")]
        for each in asking:
            each.start()
        while any(each.is_alive() for each in asking):
            if request := side.request():
                side.answer(request, 5, request.action)
    assert [each.answer.said for each in asking if isinstance(each.answer, Answer)] == ["checkpoint", "preview"]


def test_training_that_ends_without_an_answer_is_an_error(tmp_path: Path) -> None:
    with training(tmp_path, []) as side:
        asking = Asking(tmp_path, "pause")
        asking.start()
        awaited(side)
    asking.join()
    assert isinstance(asking.answer, BadConfig)
    assert asking.answer.faults[0].what == "the training ended before it answered"


def test_run_in_which_nothing_trains_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as refused:
        ask(tmp_path, "pause", silent)
    assert refused.value.faults[0].code == "control.nobody"
    # What a killed training leaves is no training.
    (tmp_path / results.CONTROL_LOCK).write_text("pid 1 on somewhere")
    with pytest.raises(BadConfig):
        ask(tmp_path, "pause", silent)
    assert not (tmp_path / results.CONTROL_REQUEST).exists()


def test_old_request_is_not_for_a_new_training(tmp_path: Path) -> None:
    (tmp_path / results.CONTROL_REQUEST).write_text('{"action": "stop"}')
    with training(tmp_path, []) as side:
        assert side.request() is None
        (tmp_path / results.CONTROL_REQUEST).write_text('{"action": "stop"}')
        assert side.request() == Request(action="stop")


@pytest.mark.parametrize("text", ["", "stop", '{"action": "explode"}', '{"action": "stop", "force": true}', "\xff"])
def test_file_that_is_no_request_is_removed_with_a_warning(tmp_path: Path, text: str) -> None:
    said: list[str] = []
    with training(tmp_path, said) as side:
        (tmp_path / results.CONTROL_REQUEST).write_bytes(text.encode("latin-1"))
        assert side.request() is None
        assert not (tmp_path / results.CONTROL_REQUEST).exists()
    [warning] = said
    assert "not a request" in warning


def test_disk_is_looked_at_no_more_often_than_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with training(tmp_path, []) as side:
        monkeypatch.setattr(control, "LOOK_SECONDS", 3600.0)
        assert side.request() is None
        (tmp_path / results.CONTROL_REQUEST).write_text('{"action": "stop"}')
        assert side.request() is None
        monkeypatch.setattr(control, "LOOK_SECONDS", 0.0)
        assert side.request() is not None


@dataclass
class Asked:
    """Somebody who asks for something after a step, and for more while the training is paused."""

    folder: Path
    wishes: dict[int, Action]
    meanwhile: list[Action] = field(default_factory=list[Action])
    said: list[str] = field(default_factory=list[str])
    pausing: bool = False

    def ask(self, action: Action) -> None:
        (self.folder / results.CONTROL_REQUEST).write_bytes(msgspec.json.encode({"action": action}))

    def heard(self, line: Line) -> None:
        if line["step"] in self.wishes:
            self.ask(self.wishes[int(line["step"])])

    @contextlib.contextmanager
    def paused(self, _: str) -> Generator[None]:
        self.pausing = True
        self.ask(self.meanwhile.pop(0))
        yield

    def say(self, text: str) -> None:
        self.said.append(text)
        self.pausing &= "going on" not in text
        if self.meanwhile and self.pausing:
            self.ask(self.meanwhile.pop(0))

    def go(self, run: Run) -> None:
        with Control(self.folder, paused=self.paused, say=self.say, warn=self.say) as run.control:
            run.go(self.heard)


@pytest.mark.parametrize(
    ("wishes", "meanwhile", "saved", "said"),
    [
        ({1: "checkpoint"}, [], [(2, False), (3, True), (6, True), (8, True)], ["step 2 is saved"]),
        ({4: "preview"}, [], [(3, True), (5, True), (6, True), (8, True)], ["step 5 is saved"]),
        ({3: "checkpoint"}, [], [(3, True), (6, True), (8, True)], ["step 3 is saved"]),
        ({8: "stop"}, [], [(3, True), (6, True), (8, True)], ["stopped after step 8; it is saved"]),
        ({2: "resume"}, [], [(3, True), (6, True), (8, True)], ["going on after step 3"]),
        (
            {3: "pause", 6: "pause"},
            ["resume", "resume"],
            [(3, True), (6, True), (8, True)],
            ["paused after step 3", "going on after step 3", "paused after step 6", "going on after step 6"],
        ),
        (
            {1: "pause"},
            ["pause", "checkpoint", "preview", "resume"],
            [(2, False), (2, True), (3, True), (6, True), (8, True)],
            ["paused", "paused", "step 2 is saved", "step 2 is saved", "going on"],
        ),
    ],
)
def test_what_is_asked_is_done_and_changes_nothing(
    run: Run,
    unbroken: Run,
    wishes: dict[int, Action],
    meanwhile: list[Action],
    saved: list[tuple[int, bool]],
    said: list[str],
) -> None:
    asked = Asked(run.store, wishes, meanwhile)
    asked.go(run)
    assert run.checkpoints == saved
    assert [text.startswith(f"control: {start}") for text, start in zip(asked.said, said, strict=True)] == [
        True
    ] * len(said)
    assert run.trace() == unbroken.trace()


@pytest.mark.parametrize(("wishes", "meanwhile"), [({1: "stop"}, []), ({1: "pause"}, ["stop"])])
def test_stop_is_a_durable_checkpoint_and_the_code_of_sigterm(
    run: Run, unbroken: Run, wishes: dict[int, Action], meanwhile: list[Action]
) -> None:
    asked = Asked(run.store, wishes, meanwhile)
    with pytest.raises(Stopped) as stopped:
        asked.go(run)
    assert stopped.value.signal_number == signal.SIGTERM
    assert run.checkpoints == [(2, False)]
    assert asked.said[-1] == "control: stopped after step 2; it is saved"
    run.control = None
    run.go()
    assert run.trace() == unbroken.trace()


def test_signal_ends_a_pause(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(run.store, {1: "pause"}, ["checkpoint"])
    monkeypatch.setattr(asked, "say", lambda text: signal.raise_signal(signal.SIGINT) if "saved" in text else None)
    with pytest.raises(Stopped) as stopped:
        asked.go(run)
    assert stopped.value.signal_number == signal.SIGINT
    assert run.checkpoints == [(2, False)]


def test_checkpoint_asked_for_on_a_full_disk_does_not_end_the_training(run: Run, unbroken: Run) -> None:
    run.full = {2}
    asked = Asked(run.store, {1: "checkpoint"})
    asked.go(run)
    assert asked.said[0].startswith("control: step 2 could not be saved, training goes on")
    assert run.trace() == unbroken.trace()
