"""Sudden death of what writes beside a store: bundle, unbundle and ema leave a whole result, or none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.children import NO_FAULT, Bench
from tests.faults.conftest import Count, Measured
from tests.faults.judge import differences
from tests.faults.points import calls, chosen, distinct
from tests.faults.zygote import Answer, Fault
from tests.stages.project import contents

# What each writes, below the project.
OUTPUTS = {"bundle": "cat.zip", "unbundle": "copy", "ema": "smooth.safetensors"}
COMPLETE = 2


def made(bench: Bench, command: str, fault: Fault = NO_FAULT) -> Answer:
    output = bench.root / OUTPUTS[command]
    if command == "unbundle":
        return bench.ask(["unbundle", "cat.zip", "--unsigned", "--output", str(output)], fault)
    return bench.stage(command, fault, "--output", str(output))


def content(path: Path) -> object:
    """Return what lies at a path; nothing where nothing does."""
    return contents(path) if path.is_dir() else path.read_bytes() if path.exists() else None


@pytest.mark.bar("Q1", "Q2")
@pytest.mark.parametrize("command", OUTPUTS)
def test_helper_that_dies_leaves_all_or_nothing_and_the_same_command_heals(
    bench: Bench, command: str, count: Count, measured: Measured
) -> None:
    bench.put(bench.reference)
    if command == "unbundle":
        assert made(bench, "bundle").code == 0
    name = f"before {command}"
    bench.keep(name)
    unbroken = made(bench, command)
    assert unbroken.code == 0, unbroken.err
    output = bench.root / OUTPUTS[command]
    expected = content(output)
    bench.keep(f"after {command}")
    numbers = [call.number for call in distinct(calls(unbroken.log, "w"))]
    half, unhealed = list[str](), list[str]()
    tried = chosen(numbers, count, 3)
    for at in tried:
        bench.put(bench.after[name])
        died = made(bench, command, Fault(at=at, mode="kill"))
        assert died.code in (-signal.SIGKILL, 0), died.err
        there = content(output)
        if there not in (None, expected):
            half.append(f"{at}: {OUTPUTS[command]} is half there")
        again = made(bench, command)
        # Unpacking writes over nothing: it is done, whatever it died of.
        done = command == "unbundle" and there is not None and again.code == COMPLETE
        if again.code != 0 and not done:
            unhealed.append(f"{at}: exit {again.code} {again.err}")
        unhealed += [f"{at}: {each}" for each in differences(bench.root, bench.after[f"after {command}"])]
    measured("Q1", f"{command}: all or nothing at {len(tried) - len(half)} of {len(tried)}")
    bads = len({each.partition(":")[0] for each in unhealed})
    measured("Q2", f"{command}: the reference again, no litter, at {len(tried) - bads} of {len(tried)}")
    assert half == []
    assert unhealed == []
