from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from schemas.errors import RejectedInput
from stages.contract.digests import sha256_bytes
from stages.dataset.pixels import Inspected, inspect, pixels, read_picture
from tests.dataset.corpus import bilevel_png, chunk, encoded, jpeg, png, raw_png, scene, turned, webp, write

WHOLE = (0, 0, 96, 64)
LIMIT = 64.0


def look(tmp_path: Path, data: bytes, name: str = "a.png", limit: float = LIMIT) -> Inspected:
    write(tmp_path, {name: data})
    return inspect(read_picture(tmp_path / name, name), name, limit)


def code(tmp_path: Path, data: bytes, limit: float = LIMIT) -> str:
    with pytest.raises(RejectedInput) as caught:
        look(tmp_path, data, limit=limit)
    (fault,) = caught.value.faults
    assert fault.where == "a.png"
    assert fault.fix
    return fault.code


def levels(data: bytes, background: str = "") -> np.ndarray:
    """Return the whole picture's pixels as 8-bit levels [H, W, 3], unscaled."""
    size = Image.open(io.BytesIO(data)).size
    values = pixels(data, (0, 0, *size), size, background)
    return ((values.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)


def test_size_and_digest_are_those_of_the_bytes(tmp_path: Path) -> None:
    for data, name in ((png(), "a.png"), (jpeg(), "a.jpg"), (webp(), "a.webp")):
        assert look(tmp_path, data, name) == Inspected(96, 64, sha256_bytes(data), transparent=False)


@pytest.mark.parametrize("cut", [1, 2, 12, 90, 0.5])
@pytest.mark.parametrize("make", [png, jpeg, webp])
def test_picture_cut_off_anywhere_is_rejected(tmp_path: Path, make, cut) -> None:
    data = make()
    missing = int(len(data) * cut) if cut < 1 else cut
    assert code(tmp_path, data[:-missing]) in ("picture.truncated", "picture.damaged")


def test_end_inside_an_embedded_thumbnail_does_not_count(tmp_path: Path) -> None:
    thumbnail = b"Exif\0\0" + jpeg(32, 32)
    data = jpeg()
    with_thumbnail = data[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2) + thumbnail + data[2:]
    assert look(tmp_path, with_thumbnail, "a.jpg").width == 96
    assert code(tmp_path, with_thumbnail[:-300]) == "picture.truncated"


def test_bytes_after_the_end_are_the_cameras_business(tmp_path: Path) -> None:
    assert look(tmp_path, jpeg() + b"\xff\xda trailer", "a.jpg").width == 96


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "picture.empty"),
        (b"<!DOCTYPE html><html>404</html>", "picture.not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture.not_an_image"),
        (b"%PDF-1.7\n", "picture.not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture.not_an_image"),
        (encoded(scene(), "GIF"), "picture.not_an_image"),
        (encoded(scene(), "TIFF"), "picture.not_an_image"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "picture.not_an_image"),
        (b"\xff\xd8\xff\xd9", "picture.damaged"),
        (b"\x89PNG\r\n\x1a\n", "picture.damaged"),
    ],
)
def test_what_is_not_a_picture_is_rejected_whatever_its_name(tmp_path: Path, data: bytes, expected: str) -> None:
    assert code(tmp_path, data) == expected


def test_flipped_bit_in_a_png_is_found(tmp_path: Path) -> None:
    data = bytearray(png())
    data[len(data) // 2] ^= 4
    assert code(tmp_path, bytes(data)) == "picture.damaged"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_is_rejected(tmp_path: Path, kind: str) -> None:
    frames = encoded(scene(), kind, save_all=True, append_images=[scene().rotate(90)])
    assert code(tmp_path, frames) == "picture.animated"


@pytest.mark.parametrize("side", [9000, 12000, 30000])
def test_bomb_is_rejected_by_its_header(tmp_path: Path, side: int) -> None:
    header = raw_png(side, side, 1, 0, b"")
    assert code(tmp_path, header) == "picture.too_large"


def test_limit_may_be_raised_beyond_the_decoders_own(tmp_path: Path) -> None:
    assert look(tmp_path, bilevel_png(9600, 9600), limit=100).width == 9600


def test_huge_webp_is_rejected_by_its_header(tmp_path: Path) -> None:
    canvas = (16382).to_bytes(3, "little")
    body = b"WEBPVP8X" + (10).to_bytes(4, "little") + b"\0\0\0\0" + canvas * 2
    assert code(tmp_path, b"RIFF" + len(body).to_bytes(4, "little") + body) in (
        "picture.too_large",
        "picture.damaged",
    )


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_compressed_text_and_profile_bombs_are_rejected(tmp_path: Path, name: bytes) -> None:
    packed = zlib.compressobj(9)
    zeros = b"".join([*(packed.compress(bytes(1 << 20)) for _ in range(32)), packed.flush()])
    data = png()
    bomb = data[:33] + chunk(name, b"x\0\0" + zeros) + data[33:]
    started = time.monotonic()
    assert code(tmp_path, bomb) == "picture.damaged"
    assert time.monotonic() - started < 2


def test_pipe_is_rejected_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RejectedInput, match=r"file\.not_regular"):
        read_picture(tmp_path / "a.png", "a.png")


def test_picture_that_vanished_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RejectedInput, match=r"picture\.unreadable.*No such file"):
        read_picture(tmp_path / "gone.png", "gone.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_upright_pixels(tmp_path: Path, orientation: int) -> None:
    data = turned(orientation)
    seen = look(tmp_path, data)
    assert (seen.width, seen.height, seen.notes) == (96, 64, ())
    crop, bucket = (8, 4, 88, 54), (80, 48)
    assert np.array_equal(pixels(data, crop, bucket, ""), pixels(png(), crop, bucket, ""))


def test_unknown_orientation_is_noted_and_taken_as_upright(tmp_path: Path) -> None:
    data = turned(99)
    assert "orientation" in look(tmp_path, data).notes[0]
    assert np.array_equal(levels(data), levels(png()))


def test_suffix_that_lies_is_noted(tmp_path: Path) -> None:
    assert look(tmp_path, png(), "a.jpg").notes == ("holds PNG data under another suffix",)
    for name in ("a.jpg", "a.JPEG", "a.jfif", "a.jpe"):
        assert look(tmp_path, jpeg(), name).notes == ()


def test_pixels_are_planes_between_minus_one_and_one_and_flip_mirrors_them() -> None:
    values = pixels(png(), (0, 0, 64, 64), (32, 32), "")
    assert (values.shape, values.dtype) == ((3, 32, 32), np.float32)
    assert values.min() >= -1
    assert values.max() <= 1
    assert values.flags.c_contiguous
    flipped = pixels(png(), (0, 0, 64, 64), (32, 32), "", flip=True)
    assert np.array_equal(flipped, values[:, :, ::-1])
    assert not np.array_equal(flipped, values)


def test_unscaled_crop_is_exact() -> None:
    values = pixels(png(), (7, 5, 71, 53), (64, 48), "")
    expected = np.asarray(scene())[5:53, 7:71].transpose(2, 0, 1) / np.float32(127.5) - 1
    assert np.array_equal(values, expected.astype(np.float32))


def test_16_bit_grey_is_scaled_like_its_8_bit_twin(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    data = encoded(Image.fromarray(ramp), "PNG")
    assert "16 bits" in look(tmp_path, data).notes[0]
    twin = np.rint(ramp / 257.0)
    assert np.abs(levels(data)[..., 0] - twin).max() <= 1
    assert abs(levels(data).mean() - twin.mean()) < 0.1


def test_16_bit_colour_is_within_a_level_of_its_8_bit_twin() -> None:
    eight = np.asarray(scene())
    rows = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in eight)
    assert np.abs(levels(raw_png(96, 64, 16, 2, rows)).astype(int) - eight).max() <= 1


def test_bilevel_and_palette_pictures_keep_their_colours() -> None:
    assert np.array_equal(np.unique(levels(encoded(scene().convert("1"), "PNG"))), [0, 255])
    palette = scene().quantize(16)
    assert np.array_equal(levels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_palette_picture_without_its_palette_is_damaged(tmp_path: Path) -> None:
    assert code(tmp_path, raw_png(32, 32, 8, 3, (b"\0" + bytes(32)) * 32)) == "picture.damaged"


def hidden(mode: str) -> tuple[bytes, str]:
    """A picture whose left half is fully transparent over a colour that must never be seen."""
    alpha = Image.new("L", (96, 64), 255)
    alpha.paste(0, (0, 0, 48, 64))
    red = Image.new("RGB", (96, 64), (255, 0, 0))
    match mode:
        case "RGBA" | "WEBP":
            red.putalpha(alpha)
            return encoded(
                red, "WEBP" if mode == "WEBP" else "PNG", **({"lossless": True} if mode == "WEBP" else {})
            ), mode
        case "LA":
            grey = Image.new("L", (96, 64), 255)
            return encoded(Image.merge("LA", (grey, alpha)), "PNG"), mode
        case _:
            flat = Image.new("P", (96, 64), 1)
            flat.putpalette([255, 0, 0, 0, 255, 0])
            flat.paste(0, (0, 0, 48, 64))
            transparency = 0 if mode == "index" else bytes([0, 255])
            return encoded(flat, "PNG", transparency=transparency), mode


@pytest.mark.parametrize("mode", ["RGBA", "LA", "index", "bytes", "WEBP"])
def test_transparency_shows_the_background_and_never_the_hidden_colour(tmp_path: Path, mode: str) -> None:
    data, _ = hidden(mode)
    assert look(tmp_path, data).transparent
    assert np.array_equal(levels(data, "#102030")[:, :48], np.full((64, 48, 3), (16, 32, 48), np.uint8))
    shrunk = (pixels(data, WHOLE, (48, 32), "#ffffff") + 1) * 127.5
    assert shrunk[:, :, :20].min() > 254.5


def test_one_transparent_colour_without_alpha_channel_is_transparent(tmp_path: Path) -> None:
    rgb = raw_png(2, 1, 8, 2, b"\0\xff\0\0\0\xff\0", (b"tRNS", b"\0\xff\0\0\0\0"))
    grey16 = raw_png(2, 1, 16, 0, b"\0\x80\0\0\0", (b"tRNS", b"\x80\0"))
    for data, kept in ((rgb, (0, 255, 0)), (grey16, (0, 0, 0))):
        assert look(tmp_path, data).transparent
        assert levels(data, "#0000ff").tolist() == [[[0, 0, 255], list(kept)]]


@pytest.mark.parametrize(("depth", "kind"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_transparent_colour_is_found_at_every_depth_of_a_png(tmp_path: Path, depth: int, kind: int) -> None:
    most = 2**depth - 1
    hidden_samples = [most * 2 // 3 | 1, most // 5, most // 7][: 1 if kind == 0 else 3]
    kept_samples = [0] * len(hidden_samples)
    pixels_of = [hidden_samples] * 32 + [kept_samples] * 32
    bits = "".join(f"{each:0{depth}b}" for pixel in pixels_of for each in pixel)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    data = raw_png(64, 32, depth, kind, row * 32, (b"tRNS", struct.pack(f">{len(hidden_samples)}H", *hidden_samples)))
    assert look(tmp_path, data).transparent
    assert levels(data, "#0000ff")[0, [0, 31]].tolist() == [[0, 0, 255]] * 2
    assert levels(data, "#0000ff")[0, [32, 63]].tolist() == [[0, 0, 0]] * 2


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    half = Image.new("RGBA", (96, 64), (255, 0, 0, 128))
    assert np.abs(levels(encoded(half, "PNG"), "#0000ff")[0, 0].astype(int) - (128, 0, 127)).max() <= 1


def test_cmyk_is_converted_upright_in_tone_and_refused_without_its_marker(tmp_path: Path) -> None:
    data = encoded(scene().convert("CMYK"), "JPEG", quality=100)
    assert "CMYK" in look(tmp_path, data, "a.jpg").notes[0]
    assert np.abs(levels(data).astype(int) - np.asarray(scene())).mean() < 8
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4])
    assert code(tmp_path, data[:start] + data[start + 2 + length :]) == "picture.cmyk"


def test_ycck_is_upright_in_tone_and_colour() -> None:
    cyan, magenta, yellow, black = scene().convert("CMYK").split()
    luma = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    # Pillow writes CMYK inverted, as Adobe does; the file then says that its first three channels are YCbCr.
    planes = [*(each.point(lambda value: 255 - value) for each in luma), black]
    data = bytearray(encoded(Image.merge("CMYK", planes), "JPEG", quality=98, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    assert np.abs(levels(bytes(data)).astype(int) - np.asarray(scene())).max() <= 4


def test_colour_profile_is_applied(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(levels(encoded(scene(), "PNG", icc_profile=srgb)).astype(int) - np.asarray(scene())).max() <= 1
    # A profile whose red and green primaries changed places: what it calls red is green.
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    data = encoded(scene(), "PNG", icc_profile=swapped)
    assert look(tmp_path, data).notes == ()
    assert np.abs(levels(data).astype(int) - np.asarray(scene())[..., [1, 0, 2]]).max() <= 1


def test_sixteen_bit_grey_takes_a_grey_profile_and_no_other(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    notes = look(tmp_path, encoded(Image.fromarray(values), "PNG", icc_profile=srgb)).notes
    assert "colour profile that cannot be applied" in notes[0]


def test_profile_that_cannot_be_applied_is_noted_and_the_picture_kept(tmp_path: Path) -> None:
    data = encoded(scene(), "PNG", icc_profile=b"not a profile")
    assert "colour profile" in look(tmp_path, data).notes[0]
    assert np.array_equal(levels(data), np.asarray(scene()))


def test_mutated_pictures_are_accepted_or_rejected_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(11)
    seeds = [png(), jpeg(), webp(), turned(6), hidden("bytes")[0], encoded(scene(), "JPEG", progressive=True)]
    outcomes = {"good": 0, "bad": 0}
    for round_ in range(900):
        data = bytearray(seeds[round_ % len(seeds)])
        for _ in range(rng.choice((1, 3, 30))):
            place = rng.randrange(min(len(data), rng.choice((64, 400, 1 << 20))))
            data[place] = rng.randrange(256)
        try:
            seen = look(tmp_path, bytes(data))
            pixels(bytes(data), (0, 0, min(seen.width, 32), min(seen.height, 32)), (16, 16), "#ffffff")
            outcomes["good"] += 1
        except RejectedInput:
            outcomes["bad"] += 1
    assert outcomes["good"] > 50
    assert outcomes["bad"] > 50
