"""Who reads a store keeps gc out of it, and where nobody can be kept out that is said and nothing is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.children import NO_FAULT, Bench, result
from tests.faults.conftest import Measured
from tests.faults.judge import STAGES, differences, half_published
from tests.faults.zygote import Answer
from tests.stages.project import contents

BUSY, RESOURCES = 6, 7
# While a command reads or makes a record, everything that could go is to go at once.
COLLECTING = """
import contextlib, io, os
import {module} as module
from stages.cli import run
name, working = {function!r}, module.{owner}{function}
def collecting(*arguments, **named):
    found = working(*arguments, **named)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(["gc", "--store", "store", "--runs", "runs", "--older-than", "0", "--delete", "--quiet"])
    marks = os.open({marks!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(marks, b"%d " % code)
    os.close(marks)
    return found
setattr(module{holder}, name, collecting)
"""
# Each with a function that it calls in the middle of its work.
READERS = {
    "encode-latents": "stages.encode_latents:_latent",
    "encode-text": "stages.encode_text:_embedding",
    "train": "stages.training.recorder:Recorder.line",
    "preview": "stages.preview:Preview.build",
    "ema": "stages.ema:average",
    "find-lr": "stages.find_lr:sweep",
    "bundle": "stages.bundle:write_zip",
}
HELPERS = {
    "ema": ("--output", "smooth.safetensors"),
    "find-lr": ("--output", "chart.png", "--steps", "10"),
    "bundle": ("--output", "cat.zip"),
}


def with_collector(bench: Bench, command: str, marks: Path) -> Answer:
    """Run a command that is disturbed in the middle by gc, as another process would."""
    module, _, name = READERS[command].partition(":")
    owner, _, function = name.rpartition(".")
    script = COLLECTING.format(
        module=module,
        function=function,
        owner=f"{owner}." if owner else "",
        holder=f".{owner}" if owner else "",
        marks=str(marks),
    )
    return bench.stage(command, NO_FAULT, *HELPERS.get(command, ()), script=script)


@pytest.mark.bar("C6")
def test_nothing_is_collected_while_anyone_reads(bench: Bench, measured: Measured) -> None:
    refused: dict[str, list[int]] = {}
    marks = bench.folder / "collected"
    for command in READERS:
        marks.unlink(missing_ok=True)
        bench.put(bench.before(command) if command in STAGES else bench.reference)
        ran = with_collector(bench, command, marks)
        assert ran.code == 0, ran.err
        refused[command] = [int(code) for code in marks.read_text().split()]
        if command in STAGES:
            assert result(ran)["digest"] == result(bench.ran[command])["digest"]
    kept_out = [command for command, codes in refused.items() if set(codes) == {BUSY}]
    tries = sum(map(len, refused.values()))
    measured("C6", f"{len(kept_out)} of {len(READERS)} commands kept gc out, {tries} times in all")
    assert kept_out == list(READERS)
    # It is not that gc could not have done it.
    collected = bench.ask(["gc", "--store", "store", "--runs", "runs", "--older-than", "0", "--delete", "--json"])
    assert collected.code == 0, collected.err


UNLOCKABLE = """
import errno, fcntl, os
lock = fcntl.flock
def flock(file, operation):
    number = file if isinstance(file, int) else file.fileno()
    if os.readlink(f"/proc/self/fd/{{number}}").startswith({below!r}):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    return lock(file, operation)
fcntl.flock = flock
"""


@pytest.mark.bar("C8")
@pytest.mark.parametrize("place", ["store", "runs"])
def test_file_system_without_locks_is_named_and_nothing_half_is_left(
    bench: Bench, place: str, measured: Measured
) -> None:
    said: dict[str, tuple[int, str]] = {}
    for command in (*STAGES, *(HELPERS if place == "store" else ())):
        bench.put(bench.before(command) if command in STAGES else bench.reference)
        script = UNLOCKABLE.format(below=str(bench.root / place))
        ran = bench.stage(command, NO_FAULT, *HELPERS.get(command, ()), script=script)
        said[command] = (ran.code, json.loads(ran.out)["error"]["code"])
        assert "fix: " in ran.err
        assert half_published(bench.root, bench.reference) == []
        if command in STAGES:
            # Where there are locks it goes on.
            assert bench.stage(command).code == 0
            assert [each for each in differences(bench.root, bench.after[command]) if "preview" not in each] == []
    right = [command for command in said if said[command] == (RESOURCES, "lock.unsupported")]
    measured("C8", f"no locks in {place}: {len(right)} of {len(said)} commands end with {RESOURCES} and a remedy")
    assert right == list(said)


@pytest.mark.bar("C8")
def test_verify_needs_no_locks_and_says_what_it_could_not_keep(bench: Bench, measured: Measured) -> None:
    bench.put(bench.reference)
    before = contents(bench.root)
    ran = bench.stage("verify", script=UNLOCKABLE.format(below=str(bench.root)))
    measured("C8", f"no locks anywhere: verify ends with {ran.code} and {result(ran)['counts']['errors']} errors")
    assert (ran.code, result(ran)["counts"]["errors"]) == (0, 0)
    assert "lock.unsupported" in ran.err
    assert contents(bench.root) == before
