"""Decoding in children: the same numbers as in this process, and no picture that can do harm to anything."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from schemas.errors import Fault, NoResources, RejectedInput
from stages.dataset import decoder, pixels
from stages.dataset.decoder import MOST_TOGETHER, Decoders
from stages.dataset.pixels import Inspected
from tests.dataset.corpus import encoded, jpeg, png, scene, turned, webp, write

WHOLE = (0, 0, 96, 64)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and macOS has no memory limit")


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    made = Decoders(64.0)
    yield made
    made.close()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """Decoders with holes, that wait for a second."""
    monkeypatch.setattr(decoder, "MODULE", "tests.dataset.breaking")
    made = Decoders(64.0, seconds=1.0)
    yield made
    made.close()


def kinds() -> dict[str, bytes]:
    """A picture of every kind that decoders have code of their own for."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    alpha = scene().convert("RGBA")
    alpha.putalpha(scene().convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain.png": png(),
        "plain.jpg": jpeg(),
        "plain.webp": webp(),
        "alpha.png": encoded(alpha, "PNG"),
        "alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "palette.png": encoded(scene().quantize(16), "PNG", transparency=0),
        "bytes.png": encoded(scene().quantize(2), "PNG", transparency=bytes([0, 255])),
        "bit.png": encoded(scene().convert("1"), "PNG"),
        "grey.jpg": encoded(scene().convert("L"), "JPEG"),
        "deep.png": encoded(Image.fromarray(grey), "PNG"),
        "deep-hole.png": encoded(Image.fromarray(grey), "PNG", transparency=0),
        "ink.jpg": encoded(scene().convert("CMYK"), "JPEG", quality=95),
        "profile.png": encoded(scene(), "PNG", icc_profile=srgb),
        "profile.jpg": encoded(scene(), "JPEG", icc_profile=srgb),
        "odd-profile.jpg": encoded(scene(), "JPEG", icc_profile=b"none"),
        "turned.png": turned(5),
        "turned.jpg": encoded(scene(), "JPEG", exif=exif),
        "turned.webp": encoded(scene(), "WEBP", exif=exif),
        "progressive.jpg": encoded(scene(), "JPEG", progressive=True),
        "two.jpg": encoded(scene(), "MPO", save_all=True, append_images=[scene()]),
        "moving.png": encoded(scene(), "PNG", save_all=True, append_images=[scene().rotate(90)]),
        "short.jpg": jpeg()[:-200],
        "text.png": b"<html>",
        "nothing.png": b"",
    }


def test_children_say_what_this_process_would_say(tmp_path: Path, decoders: Decoders) -> None:
    files = kinds()
    write(tmp_path, files)
    for (name, data), found in zip(files.items(), decoders.inspect(tmp_path, list(files)), strict=True):
        try:
            expected: Inspected | Fault = pixels.inspect(data, name, 64.0)
        except RejectedInput as error:
            expected = error.faults[0]
        assert found == expected, name


def test_pixels_and_masks_of_every_kind_are_those_of_this_process_to_the_bit(decoders: Decoders) -> None:
    crop, bucket = (3, 2, 63, 62), (64, 48)
    for name, data in kinds().items():
        if name in ("short.jpg", "text.png", "nothing.png"):
            continue
        for flip in (False, True):
            expected = pixels.pixels(data, crop, bucket, "#10a0f0", flip=flip)
            assert np.array_equal(decoders.pixels(data, crop, bucket, "#10a0f0", flip=flip), expected), name
        for source in ("alpha", "files"):
            cells = pixels.coverage(data, source, crop, bucket)
            assert np.array_equal(decoders.coverage(data, source, crop, bucket), cells), name


def test_picture_cut_off_later_is_rejected_when_its_pixels_are_asked_for(decoders: Decoders) -> None:
    with pytest.raises(RejectedInput, match=r"picture\.damaged.*a/b\.jpg"):
        decoders.pixels(jpeg()[:-300], WHOLE, (32, 32), "", where="a/b.jpg")


def test_one_child_does_it_all(tmp_path: Path, decoders: Decoders) -> None:
    write(tmp_path, {f"{number}.png": png() for number in range(3 * MOST_TOGETHER)})
    list(decoders.inspect(tmp_path, ["0.png"]))
    before = pids(decoders)
    seen = list(decoders.inspect(tmp_path, [f"{number}.png" for number in range(3 * MOST_TOGETHER)]))
    assert len(seen) == 3 * MOST_TOGETHER
    assert pids(decoders) == before
    assert len(before) == 1


@pytest.mark.parametrize(
    ("word", "code", "why"),
    [
        ("crash", "picture.crash", "SIGABRT"),
        ("leave", "picture.crash", "exit code 1"),
        ("hang", "picture.too_slow", "1 s"),
        ("open", "picture.crash", "exit code 1"),
        pytest.param("memory", "picture.too_large", "", marks=LINUX),
    ],
)
def test_picture_that_ends_the_decoder_is_the_one_blamed_and_the_others_are_seen(
    tmp_path: Path, broken: Decoders, word: str, code: str, why: str
) -> None:
    write(tmp_path, {"a.png": png(), "b.png": png() + word.encode(), "c.png": png()})
    first, bad, last = broken.inspect(tmp_path, ["a.png", "b.png", "c.png"])
    assert isinstance(first, Inspected)
    assert isinstance(last, Inspected)
    assert isinstance(bad, Fault)
    assert (bad.code, bad.where) == (code, "b.png")
    assert why in bad.why
    assert bad.fix


def test_child_killed_from_outside_is_replaced(tmp_path: Path, broken: Decoders) -> None:
    write(tmp_path, {"a.png": png(), "b.png": png()})
    list(broken.inspect(tmp_path, ["a.png"]))
    (pid,) = pids(broken)
    os.kill(pid, 9)
    # In a group of two: the first request finds the child gone, and each is asked for again.
    assert all(isinstance(each, Inspected) for each in broken.inspect(tmp_path, ["a.png", "b.png"]))
    assert pids(broken) != [pid]


def test_child_that_cannot_start_is_told_with_the_command_that_shows_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MODULE", "tests.dataset.no_such_module")
    write(tmp_path, {"a.png": png()})
    with pytest.raises(NoResources, match=r"decoder\.not_started.*exit code 1.*fix: .*no_such_module"):
        list(Decoders(64.0).inspect(tmp_path, ["a.png"]))


@LINUX
def test_child_has_no_open_file_no_token_and_limits_it_cannot_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "canary")
    write(tmp_path, {"a.png": png()})
    made = Decoders(64.0)
    list(made.inspect(tmp_path, ["a.png"]))
    (pid,) = pids(made)
    assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]  # noqa: PTH208
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    for name, most in {
        "open files": 3,
        "file size": 0,
        "core file size": 0,
        "address space": (2 << 30) + 2_048_000_000,
    }.items():
        (line,) = [line for line in limits if line.startswith(f"Max {name} ")]
        assert line.split()[-3:-1] == [str(most)] * 2
    made.close()


@LINUX
def test_children_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png()})
    script = (
        "import sys, time; from pathlib import Path; from stages.dataset.decoder import Decoders\n"
        "made = Decoders(64.0); list(made.inspect(Path(sys.argv[1]), ['a.png']))\n"
        "print(made._idle[0]._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}/exe").exists()


def pids(made: Decoders) -> list[int]:
    return [child._process.pid for child in made._idle]
