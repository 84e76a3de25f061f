"""Signals between steps: the first is remembered, the second ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stages.training.interruption import SIGNALS, Interruption

SECOND = """
import signal
from stages.training.interruption import Interruption

with Interruption() as interruption:
    signal.raise_signal(signal.{first})
    print(interruption.signal_number, flush=True)
    signal.raise_signal(signal.{second})
    print("still here", flush=True)
"""


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Its end is heard, also where whatever started the tests ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_remembered_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as interruption:
        assert interruption.signal_number is None
        signal.raise_signal(number)
        assert interruption.signal_number == SIGNALS[number]
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGINT")])
def test_second_signal_ends_the_process_at_once(first: str, second: str) -> None:
    program = SECOND.format(first=first, second=second)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout == f"{int(signal.Signals[first])}\n"
    assert ended.returncode == -signal.Signals[second]


def test_closed_terminal_stops_like_sigterm_unless_nohup_ignores_it() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGHUP)
        assert interruption.signal_number == signal.SIGTERM
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.signal_number is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
