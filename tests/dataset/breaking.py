"""A decoding child whose decoder has holes: some bytes in a picture crash it, fill memory, or keep it for ever."""

from __future__ import annotations

import os
import time

from stages.dataset import decoding, pixels

whole = pixels.inspect


def inspect(data: bytes, where: str, max_megapixels: float, *, glance: bool = False) -> pixels.Inspected:
    if b"crash" in data:
        os.abort()
    if b"hang" in data:
        time.sleep(3600)
    if b"leave" in data:
        raise LookupError("a bug in the decoder")
    if b"open" in data:
        with open(__file__) as file:  # noqa: PTH123
            file.read()
    if b"memory" in data:
        with pixels.decoder_errors(where):
            bytearray(8 << 30)
    return whole(data, where, max_megapixels, glance=glance)


if __name__ == "__main__":
    pixels.inspect = inspect
    decoding.main()
