"""Decoding pictures in child processes (`stages/dataset/decoding.py`), so that no file can end this one.

A child is started once and asked again and again. One that crashes, or takes too long, is replaced, and the picture
that did it has a fault of its own. As many children run as threads ask at one time.
"""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import Fault, NoResources, RejectedInput
from schemas.validate import MaskSource
from stages.dataset.decoding import (
    HEADER,
    MOST_MESSAGE_BYTES,
    Answer,
    Array,
    Box,
    Coverage,
    Inspect,
    Looked,
    Pixels,
    Ready,
    Refused,
    Request,
    Size,
    frame,
)
from stages.dataset.pixels import Inspected, read_picture

if TYPE_CHECKING:
    import numpy as np

MODULE = "stages.dataset.decoding"
# What an interpreter may need to start; tokens and the rest of the environment stay here.
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "LC_CTYPE")
START_SECONDS = 120.0
# Generous, as the machine may be busy: a core decodes 30 to 100 megapixels in a second.
LEAST_SECONDS = 10.0
SECONDS_PER_MEGAPIXEL = 0.5
LAST_SECONDS = 5.0
# The pixels of the largest bucket.
MOST_RAW_BYTES = 4096 * 4096 * 3 * 4
MAX_THREADS = 4
BYTES_PER_THREAD = 8 << 20
MOST_TOGETHER = 16
BYTES_TOGETHER = 1 << 20
# Groups handed to the threads at a time: bounds memory and how long Ctrl-C waits.
WINDOW = 16
FIX = "export the picture again as PNG or JPEG, or remove it"


class _Ended(Exception):
    """The child ended without an answer; says how."""


class _Late(Exception):
    """The child did not answer in time."""


class Decoders:
    """Children that decode pictures of at most `max_megapixels`; any thread may ask."""

    def __init__(self, max_megapixels: float, *, seconds: float | None = None) -> None:
        self._max_megapixels = max_megapixels
        self._seconds = LEAST_SECONDS + SECONDS_PER_MEGAPIXEL * max_megapixels if seconds is None else seconds
        self._idle: list[_Child] = []

    def start(self) -> None:
        """Start a child ahead of its first picture, without waiting for it: that takes a fifth of a second."""
        if not self._idle:
            self._idle.append(_Child(self._max_megapixels))

    def inspect(self, folder: Path, names: Sequence[str], *, glance: bool = False) -> Iterator[Inspected | Fault]:
        """Yield what each of these pictures below `folder` is, or its fault, in order.

        With `glance` headers are believed and no pixel is decoded. Faults are those of `read_picture` and
        `pixels.inspect`, and those of a picture that crashes the decoder or keeps it too long. Raises NoResources
        when no child can be started.
        """
        groups = list(_groups(folder, names))
        # A child per thread, and to start one takes as long as to decode some megabytes.
        threads = min(MAX_THREADS, os.cpu_count() or 1, 1 + sum(size for _, size in groups) // BYTES_PER_THREAD)
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(groups), WINDOW):
                window = [group for group, _ in groups[start : start + WINDOW]]
                for outcomes in pool.map(lambda group: self._look(folder, group, glance=glance), window):
                    yield from outcomes

    def _look(self, folder: Path, names: Sequence[str], *, glance: bool) -> list[Inspected | Fault]:
        outcomes: dict[str, Inspected | Fault] = {}
        whole: dict[str, bytes] = {}
        for name in names:
            try:
                whole[name] = read_picture(folder / name, name)
            except RejectedInput as error:
                outcomes[name] = error.faults[0]
        outcomes |= self._inspected(whole, glance=glance) if whole else {}
        return [outcomes[name] for name in names]

    def _inspected(self, pictures: Mapping[str, bytes], *, glance: bool) -> dict[str, Inspected | Fault]:
        request = Inspect(pictures=tuple((name, len(data)) for name, data in pictures.items()), glance=glance)
        try:
            answer, _ = self._ask(request, b"".join(pictures.values()), next(iter(pictures)))
        except RejectedInput as error:
            if len(pictures) == 1:
                return dict.fromkeys(pictures, error.faults[0])
            # One of them ended the child: ask a new one for each by itself.
            alone = [self._inspected({name: data}, glance=glance) for name, data in pictures.items()]
            return {name: outcome for each in alone for name, outcome in each.items()}
        outcomes = cast("Looked", answer).outcomes
        return {
            name: each.fault if isinstance(each, Refused) else each.inspected
            for name, each in zip(pictures, outcomes, strict=True)
        }

    def pixels(
        self, data: bytes, crop: Box, bucket: Size, background: str, *, flip: bool = False, where: str = ""
    ) -> np.ndarray:
        """Return what `pixels.pixels` returns, [3, height, width] float32. Raises as `inspect`."""
        return self._array(Pixels(crop=crop, bucket=bucket, background=background, flip=flip), data, where)

    def coverage(
        self, data: bytes, source: MaskSource, crop: Box, bucket: Size, *, flip: bool = False, where: str = ""
    ) -> np.ndarray:
        """Return what `pixels.coverage` returns, [1, height/16, width/16] float32. Raises as `inspect`."""
        return self._array(Coverage(source=source, crop=crop, bucket=bucket, flip=flip), data, where)

    def _array(self, request: Request, data: bytes, where: str) -> np.ndarray:
        import numpy as np

        answer, raw = self._ask(request, data, where)
        return np.frombuffer(raw, np.float32).reshape(cast("Array", answer).shape)

    def _ask(self, request: Request, data: bytes, where: str) -> tuple[Answer, bytearray]:
        try:
            child = self._idle.pop()
        except IndexError:
            child = _Child(self._max_megapixels)
        try:
            answer, raw = child.ask(request, data, self._seconds)
        except _Ended as error:
            what = "the decoder crashed on the picture"
            raise RejectedInput("picture.crash", what, where=where, why=str(error), fix=FIX) from error
        except _Late as error:
            what, why = "decoding the picture takes too long", f"stopped after {self._seconds:g} s"
            raise RejectedInput("picture.too_slow", what, where=where, why=why, fix=FIX) from error
        except BaseException:
            child.end()
            raise
        self._idle.append(child)
        if isinstance(answer, Refused):
            raise RejectedInput.of([msgspec.structs.replace(answer.fault, where=where)])
        return answer, raw

    def close(self) -> None:
        """End the children that wait for work."""
        while self._idle:
            self._idle.pop().end()


def _groups(folder: Path, names: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    """Yield pictures to be sent together, and their bytes: sending costs a small one as much as decoding it."""
    group: list[str] = []
    total = 0
    for name in names:
        size = _size(folder / name)
        if group and (len(group) == MOST_TOGETHER or total + size > BYTES_TOGETHER):
            yield group, total
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group, total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command of a child: without site, which it does not need, and without the folder we stand in."""
    return [sys.executable, "-B", "-P", "-S", "-m", module, *arguments]


def child_environment(*libraries: str) -> dict[str, str]:
    """Return the environment of a child, which imports this program and these libraries from where we do."""
    found = [importlib.util.find_spec(name) for name in libraries]
    folders = [Path(each.origin).parents[1] for each in found if each is not None and each.origin is not None]
    paths = dict.fromkeys([Path(__file__).absolute().parents[2], *folders])
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OPENBLAS_NUM_THREADS": "1"}


def decoders(max_megapixels: float) -> Decoders:
    """Return this process's children for pictures of at most that size."""
    return _of_process(os.getpid(), max_megapixels)


@cache
def _of_process(_pid: int, max_megapixels: float) -> Decoders:
    # A forked process must not speak into its parent's pipes.
    return Decoders(max_megapixels)


class _Child:
    """One process, and the pipes to it."""

    def __init__(self, max_megapixels: float) -> None:
        self._process = subprocess.Popen(
            child_command(MODULE, str(max_megapixels)),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment("msgspec", "numpy", "PIL"),
        )
        self._max_megapixels = max_megapixels
        self._ready = False

    def ask(self, request: Request, data: bytes, seconds: float) -> tuple[Answer, bytearray]:
        """Return the answer and its raw bytes. Raises _Ended or _Late, and the child is gone then."""
        if not self._ready:
            self._await_ready()
        try:
            self._send(frame(request, len(data)))
            self._send(data)
            return self._receive(time.monotonic() + seconds)
        except _Late:
            self.end()
            raise
        except (OSError, *UNREADABLE) as error:
            raise self._ended() from error

    def _await_ready(self) -> None:
        try:
            answer, _ = self._receive(time.monotonic() + START_SECONDS)
        except (_Ended, _Late) as error:
            self.end()
            answer = error
        if not isinstance(answer, Ready):
            raise NoResources(
                "decoder.not_started",
                "the process that decodes pictures does not start",
                why=str(answer),
                fix=f"see what it says: {sys.executable} -P -m {MODULE} {self._max_megapixels:g}",
            )
        self._ready = True

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, data: bytes) -> None:
        view, descriptor = memoryview(data), self._pipe("stdin")
        while view:
            view = view[os.write(descriptor, view) :]

    def _receive(self, deadline: float) -> tuple[Answer, bytearray]:
        message_bytes, raw_bytes = HEADER.unpack(self._read(HEADER.size, deadline))
        if message_bytes > MOST_MESSAGE_BYTES or raw_bytes > MOST_RAW_BYTES:
            self._process.kill()
            raise self._ended()
        answer: Answer = msgspec.json.decode(self._read(message_bytes, deadline), type=Answer)
        return answer, self._read(raw_bytes, deadline)

    def _read(self, count: int, deadline: float) -> bytearray:
        data = bytearray(count)
        view, descriptor = memoryview(data), self._pipe("stdout")
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while view:
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise _Late
            got = os.readv(descriptor, [view])
            if not got:
                raise self._ended()
            view = view[got:]
        return data

    def _pipe(self, name: str) -> int:
        return getattr(self._process, name).fileno()

    def _ended(self) -> _Ended:
        try:
            # The pipe closes a moment before the process is gone, and how it went is worth knowing.
            code = self._process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self.end()
        return _Ended(f"it ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
