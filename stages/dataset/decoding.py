"""The child process that decodes pictures: it is handed bytes, hands back numbers, and can open nothing.

Decoders are the part of the program that hostile bytes reach first. So they run in a process of their own, without
the parent's environment, under limits set before the first picture: memory, no new file or socket, nothing written to
disk, no core dump. `stages/dataset/decoder.py` starts it and speaks to it in frames over its stdin and stdout.
"""

from __future__ import annotations

import io
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from schemas.base import Strict
from schemas.errors import Fault, RejectedInput
from schemas.validate import MaskSource
from stages.dataset import pixels

if TYPE_CHECKING:
    import numpy as np

# A frame: the length of a message and of the raw bytes behind it, then both.
HEADER = struct.Struct("<IQ")
MOST_MESSAGE_BYTES = 1 << 20
# Address space of the interpreter, its libraries, a file of the largest size and its copies; and of a picture's
# pixels through every step from its own mode to RGB.
BASE_BYTES = 2 << 30
BYTES_PER_PIXEL = 32
# Whatever a picture may make Pillow import: afterwards no file can be opened.
LATER = (
    "numpy",
    "PIL.GimpGradientFile",
    "PIL.GimpPaletteFile",
    "PIL.ImageCms",
    "PIL.ImageColor",
    "PIL.ImageFile",
    "PIL.ImagePalette",
    "PIL.ImageSequence",
    "PIL.JpegImagePlugin",
    "PIL.MpoImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.WebPImagePlugin",
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_16",
)

Box = tuple[int, int, int, int]
Size = tuple[int, int]


class Inspect(Strict, frozen=True, tag=True):
    """Asks for `pixels.inspect` of each (name for errors, size in bytes) of the pictures in the raw bytes."""

    pictures: tuple[tuple[str, int], ...]
    glance: bool = False


class Pixels(Strict, frozen=True, tag=True):
    """Asks for `pixels.pixels`."""

    crop: Box
    bucket: Size
    background: str
    flip: bool


class Coverage(Strict, frozen=True, tag=True):
    """Asks for `pixels.coverage`."""

    source: MaskSource
    crop: Box
    bucket: Size
    flip: bool


class Ready(Strict, frozen=True, tag=True):
    """The limits are set."""


class Array(Strict, frozen=True, tag=True):
    """Answers Pixels and Coverage; the raw bytes are float32, row-major."""

    shape: tuple[int, int, int]


class Refused(Strict, frozen=True, tag=True):
    """The picture cannot be used."""

    fault: Fault


class Seen(Strict, frozen=True, tag=True):
    """The picture can be used."""

    inspected: pixels.Inspected


class Looked(Strict, frozen=True, tag=True):
    """Answers Inspect, in order."""

    outcomes: tuple[Seen | Refused, ...]


Request = Inspect | Pixels | Coverage
Answer = Ready | Looked | Array | Refused


def frame(message: Request | Answer, raw_bytes: int) -> bytes:
    """Return the beginning of a frame; as many raw bytes follow it."""
    data = msgspec.json.encode(message)
    return HEADER.pack(len(data), raw_bytes) + data


def main() -> None:
    """Answer one request after another until the parent closes the pipe; argv holds the most megapixels."""
    max_megapixels = float(sys.argv[1])
    # The parent gets Ctrl-C too, and ends this process by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    for module in LATER:
        import_module(module)
    confine(BASE_BYTES + int(max_megapixels * 1e6) * BYTES_PER_PIXEL)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _send(answers, Ready(), b"")
    while header := requests.read(HEADER.size):
        message_bytes, raw_bytes = HEADER.unpack(header)
        request = msgspec.json.decode(requests.read(message_bytes), type=Request)
        _send(answers, *_answer(request, requests.read(raw_bytes), max_megapixels))


def confine(memory_bytes: int) -> None:
    """Limit this process for good: no new files, no writing, no core dump, and memory where the system can."""
    limits = {resource.RLIMIT_NOFILE: 3, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    # macOS counts what it maps for every process and refuses this limit.
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = memory_bytes
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _answer(request: Request, data: bytes, max_megapixels: float) -> tuple[Answer, bytes | memoryview]:
    try:
        match request:
            case Inspect():
                return Looked(outcomes=tuple(_inspected(data, request, max_megapixels))), b""
            case Pixels(crop=crop, bucket=bucket, background=background, flip=flip):
                return _array(lambda: pixels.pixels(data, crop, bucket, background, flip=flip))
            case Coverage(source=source, crop=crop, bucket=bucket, flip=flip):
                return _array(lambda: pixels.coverage(data, source, crop, bucket, flip=flip))
    except RejectedInput as error:
        return Refused(fault=error.faults[0]), b""


def _inspected(data: bytes, request: Inspect, max_megapixels: float) -> Iterator[Seen | Refused]:
    start = 0
    for where, size in request.pictures:
        picture = data[start : start + size]
        try:
            yield Seen(inspected=pixels.inspect(picture, where, max_megapixels, glance=request.glance))
        except RejectedInput as error:
            yield Refused(fault=error.faults[0])
        start += size


def _array(make: Callable[[], np.ndarray]) -> tuple[Array, memoryview]:
    with pixels.decoder_errors(""):
        array = make()
    channels, height, width = array.shape
    return Array(shape=(channels, height, width)), array.data.cast("B")


def _send(answers: BinaryIO | io.BufferedWriter, answer: Answer, raw: bytes | memoryview) -> None:
    answers.write(frame(answer, len(raw)))
    answers.write(raw)
    answers.flush()


if __name__ == "__main__":
    main()
