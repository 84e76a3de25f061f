"""Stopping between steps: the first signal to stop is remembered, a second one ends the process at once."""

from __future__ import annotations

import signal
from types import FrameType

# What each stands for: a terminal that is closed ends a training as SIGTERM does.
SIGNALS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def heard() -> dict[int, int]:
    """Return what each signal to stop stands for, but a SIGHUP that is ignored, as nohup has it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {number: meant for number, meant in SIGNALS.items() if number != signal.SIGHUP or not ignored}


class Interruption:
    """While entered, `signal_number` becomes what the first signal stands for; the next acts as if nothing were here.

    A SIGHUP that is ignored, as nohup has it, stays ignored. A process that `follows` another finishes the step that
    one is in: Ctrl-C, which reaches both, is for the other; anything else ends it, since it has nothing to save.
    """

    def __init__(self, *, follows: bool = False) -> None:
        self.signal_number: int | None = None
        self._follows = follows
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        numbers = heard()
        handlers = dict.fromkeys(numbers, signal.SIG_DFL) | {signal.SIGINT: signal.SIG_IGN} if self._follows else {}
        self._before = {number: signal.signal(number, handlers.get(number, self._remember)) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = SIGNALS[signal.Signals(number)]
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
