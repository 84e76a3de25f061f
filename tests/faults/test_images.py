"""Pictures of group J: every verdict as stated, colours within a level, and bombs that stay small.

Everything goes through the decoding children, as it does in validate and encode-latents.
"""

from __future__ import annotations

import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from schemas.errors import Fault
from stages.dataset.decoder import Decoders
from tests.dataset.corpus import bilevel_png, chunk, encoded, jpeg, png, raw_png, scene, turned, webp, write
from tests.faults.conftest import Measured
from tests.stages.project import Project, new_project

SIZE = (96, 64)
WHOLE = (0, 0, *SIZE)
MOST_MEGABYTES = 512


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    made = Decoders(64.0)
    yield made
    made.close()


def without_adobe(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


def bomb(name: bytes, megabytes: int) -> bytes:
    """A PNG whose text or profile expands to so much."""
    packed = zlib.compressobj(9)
    zeros = b"".join([*(packed.compress(bytes(1 << 20)) for _ in range(megabytes)), packed.flush()])
    data = png()
    return data[:33] + chunk(name, b"x\0\0" + zeros) + data[33:]


def exif_bomb() -> bytes:
    """A JPEG whose EXIF says that one field has 200 million values."""
    tiff = b"MM\0\x2a\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x010E, 5, 200_000_000, 8)
    data = jpeg()
    exif = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif + data[2:]


def rejected() -> dict[str, tuple[bytes, str]]:
    """Each picture that must not pass, and its code."""
    moving = [scene().rotate(90)]
    cmyk = encoded(scene().convert("CMYK"), "JPEG", quality=95)
    return {
        **{f"half-{kind}.{kind}": (data[: len(data) // 2], f"picture.{why}") for kind, data, why in whole()},
        "last200.jpg": (jpeg()[:-200], "picture.truncated"),
        "last2.jpg": (jpeg()[:-2], "picture.truncated"),
        "noend.png": (png()[:-12], "picture.truncated"),
        "flipped.png": (png()[:200] + bytes([png()[200] ^ 1]) + png()[201:], "picture.damaged"),
        "empty.jpg": (b"", "picture.empty"),
        "page.jpg": (b"<!DOCTYPE html><html>", "picture.not_an_image"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture.not_an_image"),
        "paper.jpg": (b"%PDF-1.7\n%\xe2\xe3", "picture.not_an_image"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture.not_an_image"),
        "float.png": (encoded(Image.fromarray(np.ones((64, 96), np.float32)), "TIFF"), "picture.not_an_image"),
        "noadobe.jpg": (without_adobe(cmyk), "picture.cmyk"),
        "moving-webp.webp": (encoded(scene(), "WEBP", save_all=True, append_images=moving), "picture.animated"),
        "moving-png.png": (encoded(scene(), "PNG", save_all=True, append_images=moving), "picture.animated"),
        "moving-gif.jpg": (encoded(scene(), "GIF", save_all=True, append_images=moving), "picture.not_an_image"),
        **{f"bomb{side}.png": (bilevel_png(side, side), "picture.too_large") for side in (9000, 12000, 30000)},
        "text.png": (bomb(b"zTXt", 200), "picture.damaged"),
        "profile.png": (bomb(b"iCCP", 200), "picture.damaged"),
        "pixel.png": (png(1, 1), "picture.too_small"),
        "strip.png": (png(1, 20000), "picture.too_small"),
        "long.png": (png(400, 40), "picture.too_long"),
    }


def whole() -> list[tuple[str, bytes, str]]:
    """A picture of each kind, and what is said of its first half."""
    return [("png", png(), "truncated"), ("jpg", jpeg(), "truncated"), ("webp", webp(), "damaged")]


def noted() -> dict[str, tuple[bytes, str]]:
    """Each picture that passes with a word about it."""
    grey = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)
    return {
        "lies.jpg": (png(), "under another suffix"),
        "turned99.png": (turned(99), "orientation"),
        "cmyk.jpg": (encoded(scene().convert("CMYK"), "JPEG", quality=95), "CMYK"),
        "deep.png": (encoded(Image.fromarray(grey), "PNG"), "16 bits"),
        "badprofile.png": (encoded(scene(), "PNG", icc_profile=b"none"), "colour profile"),
    }


def peak_megabytes(made: Decoders) -> float:
    """Return the most memory that a waiting child ever had."""
    peaks = []
    for child in made._idle:
        status = Path(f"/proc/{child._process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        peaks.append(int(line.split()[1]) / 1024)
    return max(peaks)


@pytest.mark.bar("Q18")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_every_verdict_is_as_stated_and_no_bomb_grows(tmp_path: Path, decoders: Decoders, measured: Measured) -> None:
    expected = {
        name: code for name, (_, code) in rejected().items() if name not in ("pixel.png", "strip.png", "long.png")
    }
    write(tmp_path, {name: data for name, (data, _) in rejected().items()})
    write(tmp_path, {"exif.jpg": exif_bomb(), **{name: data for name, (data, _) in noted().items()}})
    wrong: list[str] = []
    slowest = 0.0
    for name, code in expected.items():
        started = time.monotonic()
        (seen,) = decoders.inspect(tmp_path, [name])
        slowest = max(slowest, time.monotonic() - started)
        if not isinstance(seen, Fault) or seen.code != code:
            wrong.append(f"{name}: {seen}")
    for name, (_, note) in noted().items():
        (seen,) = decoders.inspect(tmp_path, [name])
        if isinstance(seen, Fault) or note not in seen.notes[0]:
            wrong.append(f"{name}: {seen}")
    started = time.monotonic()
    list(decoders.inspect(tmp_path, ["exif.jpg"]))
    slowest = max(slowest, time.monotonic() - started)
    peak = peak_megabytes(decoders)
    stated = len(expected) + len(noted())
    measured("Q18", f"{stated - len(wrong)} of {stated} verdicts, slowest {slowest:.2f} s, peak {peak:.0f} MB")
    assert wrong == []
    assert slowest < 2
    assert peak < MOST_MEGABYTES


def levels(decoders: Decoders, data: bytes, background: str = "") -> np.ndarray:
    """Return the pixels as levels 0 to 255, [height, width, 3]."""
    return (decoders.pixels(data, WHOLE, SIZE, background).transpose(1, 2, 0) + 1) * 127.5


@pytest.mark.bar("Q18")
def test_colours_are_within_a_level_of_what_they_are(decoders: Decoders, measured: Measured) -> None:
    upright = np.asarray(scene()).astype(float)
    grey = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)
    twin = np.repeat((grey / 257.0)[..., None], 3, axis=2)
    sixteen = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in np.asarray(scene()))
    half = Image.new("RGBA", SIZE, (255, 0, 0, 128))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    flat = scene().quantize(16)
    cases = {
        **{f"orientation {n}": (turned(n), "", upright) for n in range(1, 9)},
        "16-bit grey": (encoded(Image.fromarray(grey), "PNG"), "", twin),
        "16-bit colour": (raw_png(*SIZE, 16, 2, sixteen), "", upright),
        "grey": (encoded(scene().convert("L"), "PNG"), "", np.asarray(scene().convert("L").convert("RGB"))),
        "palette": (encoded(flat, "PNG"), "", np.asarray(flat.convert("RGB"))),
        "alpha": (encoded(half, "PNG"), "#0000ff", np.full((64, 96, 3), (128, 0, 127))),
        "sRGB profile": (encoded(scene(), "PNG", icc_profile=srgb), "", upright),
        "swapped profile": (encoded(scene(), "PNG", icc_profile=swapped), "", upright[..., [1, 0, 2]]),
    }
    off = {
        name: float(np.abs(levels(decoders, data, under) - right).max())
        for name, (data, under, right) in cases.items()
    }
    measured("Q18", f"{sum(each <= 1.01 for each in off.values())} of {len(off)} colour tests within 1 level")
    assert {name: each for name, each in off.items() if each > 1.01} == {}


@pytest.mark.bar("Q18")
@pytest.mark.bar("Q20")
def test_one_run_lists_every_bad_picture_and_leaves_all_files_alone(tmp_path: Path, measured: Measured) -> None:
    project = new_project(tmp_path / "project")
    write(project.pictures, {name: data for name, (data, _) in rejected().items()})
    for name in rejected():
        path = project.pictures / name
        path.with_name(f"{path.name.rpartition('.')[0]}.txt").write_text("a picture")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in project.pictures.iterdir()}
    ran = project.run("validate")
    assert ran.code == 3
    found = {finding["where"]: finding["code"] for finding in ran.result["findings"]}
    missed = {name for name, (_, code) in rejected().items() if found.get(name) != code}
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error[")]
    measured("Q20", f"pictures: {len(lines)} faults, {sum('fix: ' in line for line in lines)} with a fix")
    assert missed == set()
    assert len(lines) == len(rejected())
    assert all("fix: " in line for line in lines)
    skipped = project.run("validate", sets=("validate.skip_bad=true",))
    assert (skipped.code, skipped.counts["accepted"]) == (0, 4)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in project.pictures.iterdir()} == before


def test_no_artifact_holds_a_word_of_a_picture_s_exif(tmp_path: Path) -> None:
    project: Project = new_project(tmp_path / "project")
    exif = Image.Exif()
    exif[0x010E] = "Exif-canary-52.5200N"
    for name in ("ada", "bob", "cyd", "dot"):
        Image.open(project.pictures / f"{name}.png").save(project.pictures / f"{name}.png", exif=exif)
    project.make()
    for folder in (project.store, project.results):
        for path in folder.rglob("*"):
            assert not path.is_file() or b"Exif-canary" not in path.read_bytes(), path
