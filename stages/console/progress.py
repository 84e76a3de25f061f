"""How far a stage is, how fast it goes lately and what remains, on stderr.

On a terminal a live bar; elsewhere a line now and then, without control codes; in a stage started by `run`, events
that the parent draws as one display (`ChainDisplay`). When quiet, counting is all that happens.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import printable
from schemas.events import VARIABLE, Event, Reached, Said

if TYPE_CHECKING:
    from rich.table import Table

# The rate is that of the last half minute, sampled twice a second.
WINDOW_SECONDS = 30.0
SAMPLE_SECONDS = 0.5
# How often other displays than the live bar are told.
PLAIN_SECONDS = 10.0
PLAIN_PERCENT = 10
EVENT_SECONDS = 0.25
REFRESHES_PER_SECOND = 4
BAR_WIDTH = 24
UNFINISHED = ("failed", "stopped")
Status = Literal["built", "up to date", "failed", "stopped"]

Show = Callable[[Reached], None]


@dataclass(frozen=True)
class Measures:
    """What training shows beside its progress; None is left out. Memory is the peak so far."""

    loss: float | None = None
    learning_rate: float | None = None
    peak_bytes: int | None = None

    def text(self) -> str:
        """Return the measures as they are shown."""
        shown = [
            "" if self.loss is None else f"loss {self.loss:.4f}",
            "" if self.learning_rate is None else f"rate {self.learning_rate:.2e}",
            "" if self.peak_bytes is None else f"peak {self.peak_bytes / 1e9:.1f} GB",
        ]
        return ", ".join(filter(None, shown))


class Progress:
    """Counts what a stage has done. `done` of a resumed stage counts towards the total, not towards its rate.

    `unit` is what is counted, where that is not steps or items.
    """

    def __init__(
        self,
        stage: str,
        *,
        total: int | None,
        done: int = 0,
        unit: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self._unit = unit
        self.total = total
        self.done = done
        self.changed: Callable[[], None] = _nothing
        self._clock = clock
        self._started = clock()
        self._paused_seconds = 0.0
        self._paused_at: float | None = None
        self._reached_at = 0.0
        self._samples: deque[tuple[float, int]] = deque()
        self._note = ""
        self._measures = Measures()

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Count `steps` more; `note` says what was done last."""
        self.done += steps
        self._note = note
        self._sample()
        self.changed()

    def reach(self, done: int, total: int) -> None:
        """Set how much is done, and of how much."""
        self.total = total
        self.advance(done - self.done)

    def measure(self, measures: Measures) -> None:
        """Show `measures` from now on."""
        self._measures = measures

    @contextlib.contextmanager
    def paused(self, reason: str) -> Generator[None]:
        """Do something else for a while, which neither the rate nor the time left counts."""
        self._paused_at, note = self._clock(), self._note
        self._note = reason
        self.changed()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - self._paused_at
            self._paused_at = None
            self._note = note
            self.changed()

    def rate(self) -> float | None:
        """Return steps per second over the recent window, or None before two steps that took long enough to tell.

        The first step does not count: it loads and compiles.
        """
        if not self._samples:
            return None
        since, first = self._samples[0]
        seconds = self._reached_at - since
        return (self.done - first) / seconds if seconds >= SAMPLE_SECONDS else None

    def seconds_left(self) -> float | None:
        """Return the time left at the recent rate, or None when that or the total is unknown, or all is done."""
        rate = self.rate()
        if not rate or self.total is None or self.done >= self.total:
            return None
        return max((self.total - self.done) / rate - (self._busy_seconds() - self._reached_at), 0.0)

    def snapshot(self) -> Reached:
        """Return the present state, as it is shown."""
        rate = self.rate()
        note = ", ".join(filter(None, [_rate_text(rate, self._unit), self._measures.text(), self._note]))
        return Reached(
            stage=self.stage,
            done=self.done,
            total=self.total,
            seconds=self._clock() - self._started,
            seconds_left=self.seconds_left(),
            note=printable(note),
        )

    def _busy_seconds(self) -> float:
        now = self._clock() if self._paused_at is None else self._paused_at
        return now - self._started - self._paused_seconds

    def _sample(self) -> None:
        now = self._reached_at = self._busy_seconds()
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_SECONDS:
            self._samples.append((now, self.done))
            while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_SECONDS:
                self._samples.popleft()


@contextlib.contextmanager
def progress(
    stage: str, *, total: int | None, done: int = 0, unit: str = "", quiet: bool = False
) -> Generator[Progress]:
    """Yield what counts a stage's progress, shown until the block ends in the way that suits stderr."""
    bar = Progress(stage, total=total, done=done, unit=unit)
    if quiet:
        yield bar
        return
    if os.environ.get(VARIABLE) == "1":
        with _told(bar, Throttle(send, seconds=EVENT_SECONDS)):
            yield bar
    elif is_live():
        with live(lambda: [bar.snapshot()]):
            yield bar
    else:
        with _told(bar, Throttle(write_line, seconds=PLAIN_SECONDS, percent=PLAIN_PERCENT)):
            yield bar


def line(state: Reached) -> str:
    """Return a state as text: percentage, count, time elapsed and left, note."""
    whole = state.total is not None
    counted = f"{percent(state):3.0f}% {state.done}/{state.total}" if whole else f"{state.done} done"
    left = "" if state.seconds_left is None else f", {_clock(state.seconds_left)} left"
    note = f"  {state.note}" if state.note else ""
    return f"{counted}  {_clock(state.seconds)} elapsed{left}{note}"


def percent(state: Reached) -> float:
    """Return how much is done, 0 to 100; nothing to do is all done."""
    return 100.0 * min(state.done / state.total, 1.0) if state.total else 100.0 * (state.total == 0)


class Throttle:
    """Shows a state when enough time or percent has passed since the last one shown, and always a stage's last."""

    def __init__(self, show: Show, *, seconds: float, percent: float = 200.0) -> None:
        self._show = show
        self._seconds = seconds
        self._percent = percent
        self._last: Reached | None = None

    def due(self, done: int, total: int | None, seconds: float) -> bool:
        """Whether a state with these numbers would be shown."""
        last = self._last
        if last is None or seconds - last.seconds >= self._seconds:
            return True
        return bool(total) and (done - last.done) * 100 >= self._percent * total

    def show(self, state: Reached) -> None:
        """Show `state` unless it was the last shown."""
        if self._last is None or (state.done, state.note) != (self._last.done, self._last.note):
            self._last = state
            self._show(state)


@contextlib.contextmanager
def _told(bar: Progress, throttle: Throttle) -> Generator[None]:
    started = time.monotonic()

    def changed() -> None:
        if throttle.due(bar.done, bar.total, time.monotonic() - started):
            throttle.show(bar.snapshot())

    bar.changed = changed
    try:
        yield
    finally:
        throttle.show(bar.snapshot())


def write_line(state: Reached) -> None:
    """Write a state as one plain line."""
    sys.stderr.write(f"{printable(state.stage)} {line(state)}\n")
    sys.stderr.flush()


def send(event: Event) -> None:
    """Write an event as one JSON line."""
    sys.stderr.write(msgspec.json.encode(event).decode() + "\n")
    sys.stderr.flush()


def is_live() -> bool:
    """Whether stderr is a terminal on which a line can be drawn over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def live(states: Callable[[], Sequence[Reached]]) -> Generator[None]:
    """Draw `states()` a few times a second until the block ends; lines written to stderr meanwhile go above."""
    from rich.console import Console
    from rich.live import Live

    with Live(
        console=Console(stderr=True),
        get_renderable=lambda: _drawn(states()),
        refresh_per_second=REFRESHES_PER_SECOND,
        redirect_stdout=False,
    ):
        yield


def _drawn(states: Sequence[Reached]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    drawn = Table.grid(padding=(0, 2, 0, 0))
    for state in states:
        bar = ProgressBar(total=state.total, completed=state.done, width=BAR_WIDTH, pulse=state.total is None)
        if state.total == 0:
            bar = ProgressBar(total=1, completed=1, width=BAR_WIDTH)
        text = Text(line(state), no_wrap=True, overflow="ellipsis")
        drawn.add_row(Text(printable(state.stage)), bar, text)
    return drawn


class ChainDisplay:
    """One display for stages that run one after another, each in its own process: what `run` shows.

    Feed it every line a stage writes to stderr; events move that stage's bar, other lines are passed on.
    """

    def __init__(self, stages: Sequence[str], *, quiet: bool = False) -> None:
        self._states = {stage: _waiting(stage) for stage in stages}
        self._quiet = quiet
        self._throttles: dict[str, Throttle] = {}
        self._live = False

    @contextlib.contextmanager
    def shown(self) -> Generator[ChainDisplay]:
        """Draw the display until the block ends."""
        self._live = not self._quiet and is_live()
        with live(lambda: list(self._states.values())) if self._live else contextlib.nullcontext():
            yield self

    def feed(self, text: str) -> None:
        """Take one line of a stage's stderr."""
        try:
            event = msgspec.json.decode(text, type=Event)
        except (UnicodeEncodeError, *UNREADABLE):
            event = Said(level="info", text=text.rstrip("\r\n"))
        match event:
            case Reached():
                self._reached(event, always=event.done == event.total)
            case Said():
                prefix = "warning: " if event.level == "warning" else ""
                sys.stderr.write(f"{prefix}{printable(event.text)}\n")
                sys.stderr.flush()

    def finish(self, stage: str, status: Status) -> None:
        """Mark a stage as ended, with the status of its result."""
        state = self._states[stage]
        total = state.total or 1
        done = state.done if status in UNFINISHED else total
        self._reached(
            msgspec.structs.replace(state, done=done, total=total, seconds_left=None, note=status), always=True
        )

    def _reached(self, state: Reached, *, always: bool) -> None:
        self._states[state.stage] = state
        if self._quiet or self._live:
            return
        throttle = self._throttles.setdefault(
            state.stage, Throttle(write_line, seconds=PLAIN_SECONDS, percent=PLAIN_PERCENT)
        )
        if always or throttle.due(state.done, state.total, state.seconds):
            throttle.show(state)


def _waiting(stage: str) -> Reached:
    return Reached(stage=stage, done=0, total=None, seconds=0.0, seconds_left=None, note="waiting")


def _rate_text(rate: float | None, unit: str) -> str:
    if not rate:
        return ""
    if rate < 1 and not unit:
        return f"{1 / rate:.1f} s each"
    decimals = 1 if rate < 100 else 0
    return f"{rate:.{decimals}f}{unit and f' {unit}'}/s"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _nothing() -> None:
    """Show nothing: the default of `Progress.changed`."""
