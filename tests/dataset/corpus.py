"""Small pictures, good and bad, made on the spot: no binary lies in the repository for them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """A picture without any symmetry, so that every turn and mirror shows."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // max(width - 1, 1)
    green = 255 * y // max(height - 1, 1)
    blue = np.where((x < width // 3) & (y < height // 4), 240, 30)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int = 96, height: int = 64) -> bytes:
    return encoded(scene(width, height), "PNG")


def jpeg(width: int = 96, height: int = 64) -> bytes:
    return encoded(scene(width, height), "JPEG", quality=95)


def webp(width: int = 96, height: int = 64) -> bytes:
    return encoded(scene(width, height), "WEBP", lossless=True)


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG from its parts: `rows` are filter byte + samples for each row, `extra` are chunks before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bilevel_png(width: int, height: int) -> bytes:
    """A 1-bit PNG: huge in pixels, tiny on disk."""
    return raw_png(width, height, 1, 0, (b"\0" + b"\0" * ((width + 7) // 8)) * height)


def turned(orientation: int) -> bytes:
    """The scene stored so that EXIF `orientation` makes it upright, as lossless PNG."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = scene() if undo is None else scene().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "PNG", exif=exif)


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below `folder` by their relative names."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
