"""Pictures to pixels: full-decode inspection, and the exact crop, colour and scaling that training sees.

Bytes are read once, so what is hashed is what is decoded. The three decoders are called directly: no other format can
be reached whatever a file is named, and the size in the header is checked before a single pixel is decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from schemas.errors import RejectedInput
from schemas.validate import MaskSource
from stages.contract.digests import sha256_bytes
from stages.dataset.buckets import PATCH_PX
from stages.dataset.discover import JPEG_SUFFIXES

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageCms
    from PIL.Image import Image as Picture
    from PIL.ImageFile import ImageFile

# Raise this when the same plan would give other pixels: it is part of every item id and latent key.
PLAN_VERSION = 1
# The same for pictures that lie over a background, as only theirs changed.
LAID_VERSION = 2
# Raise this when `inspect` would say something else of the same bytes: what it said is remembered.
INSPECTION_VERSION = 2
# Raise this when the same mask would give other cells.
COVERAGE_VERSION = 2
MAX_FILE_BYTES = 512 << 20

# Everything Pillow's three decoders raise on damaged data; a fuzz test holds the list.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AssertionError,
    struct.error,
    zlib.error,
)

ORIENTATION_TAG = 0x0112
SIDEWAYS = (5, 6, 7, 8)
# What lcms takes as it is; all else becomes RGB first.
PROFILED_MODES = ("L", "RGB", "CMYK")
SIXTEEN_BITS = ("I", "I;16", "I;16B")
# Any marker but padding, stuffed zeros, restarts and starts; FF D9 is the end of the picture.
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
PNG_DEPTH_AT = 24
PNG_END = b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"


@dataclass(frozen=True)
class Inspected:
    """A whole, readable picture: upright size in pixels, its bytes' sha256, and what is worth knowing about it."""

    width: int
    height: int
    image_sha256: str
    transparent: bool
    notes: tuple[str, ...] = ()


def plan(crop: tuple[int, int, int, int], bucket: tuple[int, int], background: str) -> dict[str, object]:
    """Return what turns a picture's bytes into pixels, as it enters item ids and latent keys.

    `background` is the colour under a transparent picture, "" for an opaque one.
    """
    version = LAID_VERSION if background else PLAN_VERSION
    return {"version": version, "crop": list(crop), "bucket": list(bucket), "background": background}


def inspect(data: bytes, where: str, max_megapixels: float, *, glance: bool = False) -> Inspected:
    """Decode a picture completely and return what it is; `where` names it in errors.

    With `glance` its header is believed and no pixel is decoded. Raises RejectedInput: not a JPEG, PNG or WebP,
    truncated, damaged, animated or too large.
    """
    with decoder_errors(where):
        picture = _open(data, where)
        megapixels = picture.width * picture.height / 1e6
        if megapixels > max_megapixels:
            why = f"expected at most {max_megapixels:g} megapixels, found {picture.width} x {picture.height}"
            fix = "scale it down, or raise validate.max_megapixels"
            raise _rejected("picture.too_large", "the picture is too large", where, why, fix)
        if getattr(picture, "is_animated", False):
            raise _rejected(
                "picture.animated", "the picture is an animation", where, fix="save one frame of it as PNG"
            )
        if not _is_whole(data, str(picture.format)):
            raise _rejected("picture.truncated", "the picture is cut off", where, "its end is missing")
        if not glance:
            # Only verify checks PNG checksums, only load finds damaged JPEG data; each needs a fresh start.
            picture.verify()
            picture = _open(data, where)
            picture.load()
        if picture.mode == "CMYK" and "adobe" not in picture.info:
            why = "without an Adobe marker nothing says whether its colours are inverted"
            raise _rejected("picture.cmyk", "the colours of this CMYK picture are unknown", where, why)
        width, height = picture.size if _orientation(picture) not in SIDEWAYS else picture.size[::-1]
        return Inspected(width, height, sha256_bytes(data), _is_transparent(picture), tuple(_notes(picture, where)))


@contextlib.contextmanager
def decoder_errors(where: str) -> Generator[None]:
    """Turn whatever a decoder makes of damaged data into a RejectedInput."""
    try:
        yield
    except DECODER_ERRORS as error:
        raise _rejected("picture.damaged", "the picture is damaged", where, str(error)) from error
    except MemoryError as error:
        raise _rejected("picture.too_large", "the picture does not fit into memory", where) from error


def read_picture(path: Path, where: str) -> bytes:
    """Return a picture file's bytes. Raises RejectedInput when it is not a readable regular file of bearable size."""
    try:
        # Non-blocking: opening a pipe that took the file's place must not hang.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _rejected("file.not_regular", "not a regular file", where)
            if status.st_size > MAX_FILE_BYTES:
                why = f"expected at most {MAX_FILE_BYTES} bytes, found {status.st_size}"
                raise _rejected("picture.too_large", "the file is too large", where, why)
            return file.read()
    except OSError as error:
        why = str(error.strerror)
        raise _rejected(
            "picture.unreadable", "cannot read the picture", where, why, "make the file readable"
        ) from error


def pixels(
    data: bytes, crop: tuple[int, int, int, int], bucket: tuple[int, int], background: str, *, flip: bool = False
) -> np.ndarray:
    """Return a picture's pixels [3, height, width] float32 in [-1, 1], sRGB, upright, cropped and scaled to `bucket`.

    `crop` (x0, y0, x1, y1) is in pixels of the upright picture, `bucket` is (width, height), `background` is
    "#rrggbb", or "" for an opaque picture; `flip` mirrors left and right. Scaling is one Lanczos resize of 8-bit sRGB
    values.
    """
    import numpy as np
    from PIL import Image

    picture = _in_srgb(_upright(_open(data, "")), background)
    scaled = picture.resize(bucket, Image.Resampling.LANCZOS, box=crop)
    values = np.asarray(scaled, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
    return np.ascontiguousarray(values[:, :, ::-1] if flip else values)


def coverage(
    data: bytes, source: MaskSource, crop: tuple[int, int, int, int], bucket: tuple[int, int], *, flip: bool = False
) -> np.ndarray:
    """Return how much of each 16 x 16 px of `bucket` (width, height) a mask covers: [1, height/16, width/16] float32.

    0 is outside, 1 inside. The mask is the alpha channel, or the brightness, of a picture that goes with `crop` as
    in `pixels`; cells are plain means of what they stand for.
    """
    import numpy as np
    from PIL import Image

    picture = _upright(_open(data, ""))
    match source:
        case "alpha":
            grey = _alpha(picture) or Image.new("L", picture.size, 255)
        case "files":
            grey = _in_srgb(picture, "#000000").convert("L")
        case _:
            assert_never(source)
    values = Image.fromarray(np.asarray(grey, dtype=np.float32) / 255)
    cells = values.resize((bucket[0] // PATCH_PX, bucket[1] // PATCH_PX), Image.Resampling.BOX, box=crop)
    mask = np.asarray(cells, dtype=np.float32).clip(0, 1)[None]
    return np.ascontiguousarray(mask[:, :, ::-1] if flip else mask)


def _open(data: bytes, where: str) -> ImageFile:
    from PIL.Image import DecompressionBombError
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    match data[:4]:
        case b"\x89PNG":
            return _keyed_in_levels(PngImageFile(io.BytesIO(data)), data[PNG_DEPTH_AT])
        case b"RIFF" if data[8:12] == b"WEBP":
            try:
                return WebPImageFile(io.BytesIO(data))
            except DecompressionBombError as error:
                raise _rejected("picture.too_large", "the picture is too large", where, str(error)) from error
        case head if head.startswith(b"\xff\xd8\xff"):
            return JpegImageFile(io.BytesIO(data))
        case b"":
            raise _rejected("picture.empty", "the file is empty", where)
        case _:
            why = f"expected JPEG, PNG or WebP, found a file that starts with {data[:16]!r}"
            raise _rejected("picture.not_an_image", "the file is not a picture", where, why)


def _keyed_in_levels(picture: ImageFile, depth: int) -> ImageFile:
    """Say the one transparent colour of a PNG in levels of its pixels: Pillow leaves it in those of the file."""
    match picture.info.get("transparency"):
        case int(grey) if picture.mode == "L" and depth < 8:
            most = 2**depth - 1
            picture.info["transparency"] = (grey & most) * 255 // most
        case (red, green, blue) if picture.mode == "RGB" and depth == 16:
            picture.info["transparency"] = (red >> 8, green >> 8, blue >> 8)
        case _:
            pass
    return picture


def _is_whole(data: bytes, format_name: str) -> bool:
    match format_name:
        case "PNG":
            return PNG_END in data
        case "WEBP":
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
        case _:
            return _jpeg_ends(data)


def _jpeg_ends(data: bytes) -> bool:
    """Walk the markers: an end inside an embedded thumbnail is not the end of the picture."""
    position = 2
    while marker := JPEG_MARKER.search(data, position):
        if marker[1] == b"\xd9":
            return True
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return False


def _orientation(picture: Picture) -> int:
    """Return the EXIF orientation, 1 where it is absent or unreadable."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _upright(picture: Picture) -> Picture:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _is_transparent(picture: Picture) -> bool:
    return picture.has_transparency_data or "transparency" in picture.info


def _in_srgb(picture: Picture, background: str) -> Picture:
    """Return the picture as opaque 8-bit sRGB: 16 bits scaled, profile applied, alpha laid over `background`."""
    from PIL import Image

    if picture.mode in SIXTEEN_BITS:
        colours = _from_sixteen_bits(picture)
    elif _is_transparent(picture):
        colours = picture.convert("RGBA").convert("RGB")
    else:
        colours = picture
    alpha = _alpha(picture)
    colours = _profiled(colours, picture.info.get("icc_profile"))
    if alpha is None:
        return colours
    under = Image.new("RGB", colours.size, background)
    under.paste(colours, mask=alpha)
    return under


def _alpha(picture: Picture) -> Picture | None:
    """Return how opaque each pixel is, 8 bits; None for an opaque picture."""
    import numpy as np
    from PIL import Image

    if not _is_transparent(picture):
        return None
    if picture.mode not in SIXTEEN_BITS:
        return picture.convert("RGBA").getchannel("A")
    # One value of 16-bit grey is transparent.
    opaque = np.asarray(picture) != picture.info["transparency"]
    return Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))


def _from_sixteen_bits(picture: Picture) -> Picture:
    """Return 16-bit grey as 8-bit grey, rounded to nearest."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _profiled(picture: Picture, profile: bytes | None) -> Picture:
    """Return the picture as RGB, by its colour profile where that fits."""
    from PIL import ImageCms

    plain = picture if picture.mode in PROFILED_MODES else picture.convert("RGB")
    transform = _to_srgb(plain.mode, profile)
    converted = None if transform is None else ImageCms.applyTransform(plain, transform)
    return plain.convert("RGB") if converted is None else converted


def _to_srgb(mode: str, profile: bytes | None) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile to sRGB, None without a profile or when it is damaged or of another mode."""
    from PIL import ImageCms

    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _notes(picture: Picture, where: str) -> list[str]:
    suffixes = {"JPEG": JPEG_SUFFIXES, "PNG": {"png"}, "WEBP": {"webp"}}[str(picture.format)]
    notes: list[str] = []
    if where.rpartition(".")[2].lower() not in suffixes:
        notes.append(f"holds {picture.format} data under another suffix")
    if _orientation(picture) not in range(1, 9):
        notes.append("has an EXIF orientation outside 1..8, taken as upright")
    profile = picture.info.get("icc_profile")
    mode = "L" if picture.mode in SIXTEEN_BITS else picture.mode if picture.mode in PROFILED_MODES else "RGB"
    if profile and _to_srgb(mode, profile) is None:
        notes.append("has a colour profile that cannot be applied, taken as sRGB")
    if picture.mode == "CMYK" and not profile:
        notes.append("is CMYK without a colour profile: colours are approximate")
    if picture.mode in SIXTEEN_BITS:
        notes.append("has 16 bits per channel, scaled to 8")
    return notes


def _rejected(
    code: str,
    what: str,
    where: str,
    why: str = "",
    fix: str = "export the picture again as PNG or JPEG, or remove it",
) -> RejectedInput:
    return RejectedInput(code, what, where=where, why=why, fix=fix)
