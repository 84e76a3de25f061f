from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import msgspec
import pytest

from schemas.events import VARIABLE, Event, Reached, Said
from stages.console.progress import ChainDisplay, Measures, Progress, Throttle, line, percent, progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stepped(bar: Progress, clock: Clock, steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock.now += seconds
        bar.advance()


def state(**changes: object) -> Reached:
    start = Reached(stage="train", done=0, total=100, seconds=0.0, seconds_left=None, note="")
    return msgspec.structs.replace(start, **changes)


# Counting


def test_nothing_is_said_of_the_rate_before_two_steps(clock: Clock):
    bar = Progress("train", total=10, clock=clock)
    assert bar.rate() is None
    stepped(bar, clock, 1, 57.0)
    assert bar.rate() is None
    assert bar.snapshot().seconds_left is None
    stepped(bar, clock, 1, 2.0)
    assert bar.rate() == pytest.approx(0.5)
    assert bar.seconds_left() == pytest.approx(16.0)


def test_rate_is_told_in_the_unit_counted(clock: Clock):
    bar = Progress("fetch", total=100, unit="MB", clock=clock)
    stepped(bar, clock, 3, 4.0)
    assert bar.snapshot().note == "0.2 MB/s"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.5, "2.0/s"), (1 / 99, "99.0/s"), (1 / 2226, "2226/s"), (4, "4.0 s each")]
)
def test_rate_has_a_decimal_where_it_tells_something(clock: Clock, seconds: float, said: str):
    bar = Progress("validate", total=100_000, clock=clock)
    stepped(bar, clock, 3000, seconds)
    assert bar.snapshot().note == said


def test_no_rate_is_told_of_a_moment(clock: Clock):
    bar = Progress("validate", total=12, clock=clock)
    stepped(bar, clock, 11, 0.0001)
    assert (bar.rate(), bar.seconds_left()) == (None, None)


def test_time_left_runs_down_between_steps(clock: Clock):
    bar = Progress("train", total=10, clock=clock)
    stepped(bar, clock, 5, 10.0)
    clock.now += 4.0
    assert bar.rate() == pytest.approx(0.1)
    assert bar.seconds_left() == pytest.approx(46.0)
    clock.now += 100.0
    assert bar.seconds_left() == 0.0


def test_the_rate_is_the_recent_one(clock: Clock):
    bar = Progress("train", total=1000, clock=clock)
    stepped(bar, clock, 100, 1.0)
    stepped(bar, clock, 200, 0.25)
    assert bar.rate() == pytest.approx(4.0)


def test_slow_steps_keep_a_rate(clock: Clock):
    bar = Progress("train", total=100, clock=clock)
    stepped(bar, clock, 5, 120.0)
    assert bar.rate() == pytest.approx(1 / 120)


def test_pauses_are_in_the_time_elapsed_but_not_in_the_rate(clock: Clock):
    bar = Progress("train", total=10, clock=clock)
    stepped(bar, clock, 3, 1.0)
    with bar.paused("drawing previews"):
        clock.now += 50.0
        assert "drawing previews" in bar.snapshot().note
        assert bar.seconds_left() == pytest.approx(7.0)
    stepped(bar, clock, 3, 1.0)
    assert bar.rate() == pytest.approx(1.0)
    assert bar.snapshot().seconds == pytest.approx(56.0)
    assert "drawing" not in bar.snapshot().note


def test_steps_done_before_a_resume_do_not_count_as_fast(clock: Clock):
    bar = Progress("train", total=1500, done=1000, clock=clock)
    stepped(bar, clock, 5, 2.0)
    assert (bar.done, bar.rate()) == (1005, pytest.approx(0.5))


def test_a_total_found_on_the_way_is_shown(clock: Clock):
    bar = Progress("validate", total=None, clock=clock)
    assert line(bar.snapshot()) == "0 done  0:00 elapsed"
    clock.now += 1.0
    bar.reach(3, 12)
    assert line(bar.snapshot()) == " 25% 3/12  0:01 elapsed"


def test_measures_of_training_are_shown(clock: Clock):
    bar = Progress("train", total=10, clock=clock)
    bar.measure(Measures(loss=0.51234, learning_rate=1e-4, peak_bytes=12_340_000_000))
    stepped(bar, clock, 3, 0.5)
    assert bar.snapshot().note == "2.0/s, loss 0.5123, rate 1.00e-04, peak 12.3 GB"
    bar.measure(Measures(loss=0.25))
    assert bar.snapshot().note == "2.0/s, loss 0.2500"


def test_a_line_tells_percentage_count_elapsed_and_left():
    shown = line(state(done=25, seconds=3725.0, seconds_left=61.4, note="loss 0.5"))
    assert shown == " 25% 25/100  1:02:05 elapsed, 1:01 left  loss 0.5"


@pytest.mark.parametrize(("done", "total", "expected"), [(0, 4, 0.0), (3, 4, 75.0), (9, 4, 100.0), (0, 0, 100.0)])
def test_percentages_stay_between_0_and_100(done: int, total: int, expected: float):
    assert percent(state(done=done, total=total)) == expected


# Showing


def test_a_log_gets_a_line_every_ten_percent_and_no_control_codes(capsys):
    with progress("encode-latents", total=1000) as bar:
        for number in range(1000):
            bar.advance(1, note=f"{number}\x1b[31m.png")
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == ""
    assert 10 <= len(lines) <= 12
    assert all(each.isprintable() and each.startswith("encode-latents") for each in lines)
    assert "100% 1000/1000" in lines[-1]
    assert len([each for each in lines if "1000/1000" in each]) == 1


def test_a_log_gets_a_line_every_ten_seconds():
    shown: list[Reached] = []
    throttle = Throttle(shown.append, seconds=10, percent=10)
    for second in range(61):
        if throttle.due(second // 20, 100, float(second)):
            throttle.show(state(done=second // 20, seconds=float(second), note=str(second)))
    assert [each.seconds for each in shown] == [0, 10, 20, 30, 40, 50, 60]


def test_a_failed_stage_leaves_its_last_line(capsys):
    with pytest.raises(KeyError), progress("train", total=1000) as bar:
        stop_after_three(bar)
    assert "3/1000" in capsys.readouterr().err.splitlines()[-1]


def stop_after_three(bar: Progress) -> None:
    bar.advance(3)
    raise KeyError


def test_quiet_counts_silently_and_cheaply(capsys):
    with progress("train", total=100_000, quiet=True) as bar:
        started = time.process_time()
        for _ in range(100_000):
            bar.advance()
        assert time.process_time() - started < 1.0
    assert bar.done == 100_000
    assert capsys.readouterr().err == ""


PROGRAM = """
from stages.console import messages
from stages.console.progress import progress
with progress("encode-text", total=3) as bar:
    for number in range(3):
        bar.advance(1, note=f"[red]{number}")
        messages.warn("one caption is long")
"""


def on_a_terminal(**environment: str) -> str:
    parent, child = pty.openpty()
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=child, env=settings)
    os.close(child)
    printed = b""
    while chunk := read_terminal(parent):
        printed += chunk
    os.close(parent)
    assert process.wait() == 0
    return printed.decode()


def read_terminal(parent: int) -> bytes:
    try:
        return os.read(parent, 4096)
    except OSError:  # Linux says EIO where the other end is closed
        return b""


def test_a_terminal_gets_a_live_bar_with_messages_above():
    printed = on_a_terminal()
    assert "\x1b[2K" in printed
    assert "━" in printed
    assert printed.count("warning: one caption is long") == 3
    assert "100% 3/3" in printed
    assert "[red]2" in printed


def test_no_color_is_respected():
    assert "\x1b[9" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b[9" in on_a_terminal()


def test_a_dumb_terminal_gets_plain_lines():
    printed = on_a_terminal(TERM="dumb")
    assert "\x1b" not in printed
    assert "encode-text 100% 3/3" in printed


# Chains


def test_below_a_chain_progress_is_events(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    with progress("encode-text", total=1000) as bar:
        for _ in range(1000):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    events = [msgspec.json.decode(each, type=Event) for each in lines]
    assert all(isinstance(each, Reached) for each in events)
    assert (events[-1].done, events[-1].total) == (1000, 1000)
    assert len(events) < 100


def test_a_chain_shows_what_its_stages_tell(capsys):
    with ChainDisplay(["validate", "train"]).shown() as display:
        display.feed(msgspec.json.encode(state(stage="train", done=50)).decode() + "\n")
        display.feed(msgspec.json.encode(Said(level="warning", text="odd")).decode())
        display.feed("Traceback \x1b[2J\n")
        display.feed('{"event":"unknown"}')
        display.finish("validate", "up to date")
        display.finish("train", "built")
    assert capsys.readouterr().err.splitlines() == [
        "train  50% 50/100  0:00 elapsed",
        "warning: odd",
        "Traceback \\x1b[2J",
        '{"event":"unknown"}',
        "validate 100% 1/1  0:00 elapsed  up to date",
        "train 100% 100/100  0:00 elapsed  built",
    ]


def test_a_failed_stage_of_a_chain_is_not_shown_as_done(capsys):
    with ChainDisplay(["train"]).shown() as display:
        display.feed(msgspec.json.encode(state(done=50)).decode())
        display.finish("train", "failed")
    assert capsys.readouterr().err.splitlines()[-1] == "train  50% 50/100  0:00 elapsed  failed"


def test_a_quiet_chain_passes_on_messages_alone(capsys):
    with ChainDisplay(["train"], quiet=True).shown() as display:
        display.feed(msgspec.json.encode(state(done=100)).decode())
        display.feed(msgspec.json.encode(Said(level="error", text="error[a.b] c")).decode())
    assert capsys.readouterr().err == "error[a.b] c\n"
