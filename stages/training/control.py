"""Asking a training under way to do something: one request file in its run folder, one file that answers it.

The training looks for a request between steps, at most every half second. Who asks waits for the answer, or for the
training's lock to be free: then nobody is there to answer. Nothing that can be asked changes a result.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.control import Action, Answer, Request
from schemas.errors import BadConfig, Busy
from stages.contract.locks import hold
from stages.contract.publish import make_folder, write_file

LOOK_SECONDS = 0.5
MAX_BYTES = 4096

Paused = Callable[[str], AbstractContextManager[None]]


class Control:
    """The training's side: while entered, this process answers for the run folder.

    `paused(reason)` shows that nothing goes on while its block lasts; `say` and `warn` take a line for the person.
    """

    def __init__(
        self, run_folder: Path, *, paused: Paused, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.paused = paused
        self._request = run_folder / results.CONTROL_REQUEST
        self._answer = run_folder / results.CONTROL_ANSWER
        self._lock = run_folder / results.CONTROL_LOCK
        self._say = say
        self._warn = warn
        self._looked = -LOOK_SECONDS
        self._taken = ExitStack()

    def __enter__(self) -> Control:
        make_folder(self._lock.parent)
        # What an earlier training was asked is none of this one's business.
        self._request.unlink(missing_ok=True)
        self._answer.unlink(missing_ok=True)
        self._taken.enter_context(hold(self._lock, wait=True, waiting=self._say))
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.unlink(missing_ok=True)
        self._taken.close()
        self._request.unlink(missing_ok=True)

    def request(self) -> Request | None:
        """Return what is asked now; None between two looks at the disk, and when it was answered already."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        try:
            with self._request.open("rb") as file:
                return msgspec.json.decode(file.read(MAX_BYTES), type=Request)
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as error:
            self._warn(f"{self._request}: not a request ({error}); ask with flux2-lora control")
            self._request.unlink(missing_ok=True)
            return None

    def answer(self, request: Request, step: int, said: str) -> None:
        """Say what was done after `step`, to who asked and to who watches."""
        write_file(self._answer, msgspec.json.encode(Answer(id=request.id, step=step, said=said)))
        # Only now: who asked asks again when neither the request nor its answer is there.
        self._request.unlink(missing_ok=True)
        self._say(f"control: {said}")


def ask(run_folder: Path, action: Action, waiting: Callable[[str], None]) -> Answer:
    """Ask the training in `run_folder` for `action` and return its answer; `waiting` hears who is being asked.

    Raises BadConfig when no training is under way there, or it ends without an answer.
    """
    holder = who_trains(run_folder)
    if holder is None:
        raise _nobody("no training is under way in this run", run_folder)
    request = Request(action=action, id=uuid.uuid4().hex)
    asked, answered = run_folder / results.CONTROL_REQUEST, run_folder / results.CONTROL_ANSWER
    waiting(f"asking {holder} to {action}; it answers between two steps")
    while True:
        there = who_trains(run_folder) is not None
        # Read after that look: an answer given just before the training ended is found.
        answer = _read(answered)
        if answer is not None and answer.id == request.id:
            answered.unlink(missing_ok=True)
            return answer
        if not there:
            raise _nobody("the training ended before it answered", run_folder)
        if not asked.exists():
            # One request at a time: after another's was answered, this one takes its place.
            write_file(asked, msgspec.json.encode(request))
        time.sleep(LOOK_SECONDS / 5)


def who_trains(run_folder: Path) -> str | None:
    """Return the process that trains there; None when there is none."""
    lock = run_folder / results.CONTROL_LOCK
    if not lock.is_file():
        return None
    try:
        with hold(lock, wait=False, waiting=lambda _: None):
            return None
    except Busy as error:
        return error.faults[0].why


def _read(path: Path) -> Answer | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Answer)
    except (OSError, *UNREADABLE):
        return None


def _nobody(what: str, run_folder: Path) -> BadConfig:
    fix = "give the command that began the training again: it goes on from the last checkpoint"
    return BadConfig("control.nobody", what, where=str(run_folder), fix=fix)
