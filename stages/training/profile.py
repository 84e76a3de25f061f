"""Where the time of training steps goes: phases timed on the host, as a table and as a trace for a browser.

While it is on the device is waited for after every step, so that computing is told from preparing; steps no longer
overlap, and a step takes a little longer than it would. No number of the training changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

import mlx.core as mx
import msgspec

from schemas import results
from stages.console.messages import say, table
from stages.contract.publish import write_file

READ, WAIT, BUILD, COMPUTE = "read ahead (in parallel)", "wait for data", "build graph", "compute"
RECORD, SAVE, DRAW, VALIDATE = "record", "checkpoint", "preview", "validate"

Item = TypeVar("Item")
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass
class _Open:
    """A phase that has begun; `inside` are the seconds of phases within it."""

    name: str
    began: float
    inside: float = 0.0


@dataclass(frozen=True)
class Span:
    """A phase that has ended: seconds since the start, in all and without those within it, and the bytes then."""

    name: str
    thread: str
    step: int
    began: float
    seconds: float
    own_seconds: float
    active_bytes: int
    peak_bytes: int


@dataclass
class Profile:
    """Times the phases of `steps` steps; of none, it is off and costs nothing but a call."""

    steps: int = 0
    spans: list[Span] = field(default_factory=list[Span])

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        self._step = 0
        self._open = threading.local()

    @property
    def on(self) -> bool:
        """Whether there are steps left to time."""
        return self._step < self.steps

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a block under `name`; within another it is not counted towards that one."""
        return self._timed(name) if self.on else _NOTHING

    def waits(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield `items`, and time how long each is waited for."""
        return self._waits(items) if self.on else items

    def computing(self) -> AbstractContextManager[None]:
        """Time a block that starts to compute, until all is computed."""
        return self._computing() if self.on else _NOTHING

    def next_step(self) -> None:
        """Go on to the next step."""
        self._step += 1

    @contextmanager
    def _computing(self) -> Generator[None]:
        with self._timed(COMPUTE):
            yield
            mx.synchronize()

    def _waits(self, items: Iterator[Item]) -> Generator[Item]:
        while True:
            with self.phase(WAIT):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        stack: list[_Open] = self._open.__dict__.setdefault("stack", [])
        opened = _Open(name, time.perf_counter())
        stack.append(opened)
        try:
            yield
        finally:
            stack.pop()
            seconds = time.perf_counter() - opened.began
            if stack:
                stack[-1].inside += seconds
            self.spans.append(
                Span(
                    name=name,
                    thread=threading.current_thread().name,
                    step=self._step,
                    began=opened.began - self._started,
                    seconds=seconds,
                    own_seconds=seconds - opened.inside,
                    active_bytes=mx.get_active_memory(),
                    peak_bytes=mx.get_peak_memory(),
                )
            )


@contextmanager
def profiling(steps: int, run_folder: Path) -> Generator[Profile]:
    """Yield a profile of the first `steps` steps; at the end show its table and write its trace."""
    profile = Profile(steps)
    try:
        yield profile
    finally:
        if profile.spans:
            path = run_folder / results.TRACE
            write_file(path, trace(profile.spans))
            table(f"profile of {min(profile.steps, profile._step)} steps", HEADER, rows(profile.spans))
            say(f"trace: {path} (open it at chrome://tracing or ui.perfetto.dev)")


HEADER = ("phase", "times", "median ms", "in all s", "share", "peak GB")


def rows(spans: list[Span]) -> list[list[str]]:
    """Return a row per phase, longest first; the share is that of the main thread's time."""
    names = dict.fromkeys(span.name for span in spans)
    totals = {name: sum(span.own_seconds for span in spans if span.name == name) for name in names}
    whole = sum(seconds for name, seconds in totals.items() if name != READ) or 1.0
    listed: list[list[str]] = []
    for name in sorted(names, key=lambda name: -totals[name]):
        own = [span for span in spans if span.name == name]
        listed.append(
            [
                name,
                str(len(own)),
                f"{1000 * median(span.own_seconds for span in own):.1f}",
                f"{totals[name]:.2f}",
                "" if name == READ else f"{100 * totals[name] / whole:.1f} %",
                f"{max(span.peak_bytes for span in own) / 1e9:.2f}",
            ]
        )
    return listed


def trace(spans: list[Span]) -> bytes:
    """Return the spans in Chrome's trace event format, with memory as a counter; times are microseconds."""
    threads = {name: number for number, name in enumerate(dict.fromkeys(span.thread for span in spans))}
    events: list[dict[str, object]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": name}}
        for name, number in threads.items()
    ]
    for span in sorted(spans, key=lambda span: span.began):
        place = {"pid": 0, "tid": threads[span.thread], "ts": round(1e6 * span.began, 1)}
        events.append(
            {"name": span.name, "ph": "X", **place, "dur": round(1e6 * span.seconds, 1), "args": {"step": span.step}}
        )
        end = {**place, "ts": round(1e6 * (span.began + span.seconds), 1)}
        events.append({"name": "memory", "ph": "C", **end, "args": {"active bytes": span.active_bytes}})
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"}) + b"\n"
