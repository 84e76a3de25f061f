"""Eight processes at once on one store: all end well, and what they leave is whole and there once."""

from __future__ import annotations

import json

import pytest

from tests.faults.children import Bench
from tests.faults.conftest import Count, Measured
from tests.faults.judge import half_published

PROCESSES = 8
ROUNDS = 20
# Each forks off, runs the chain in a run of its own, and says the exit code of every stage.
RACE = """
import json, os, sys
from pathlib import Path
from stages.cli import run
arm()
runs = json.loads({runs!r})
children = []
for name, sets in runs:
    child = os.fork()
    if child == 0:
        config = Path(name + ".toml")
        config.write_bytes(Path("cat.toml").read_bytes())
        for stage in ("validate", "encode-latents", "encode-text", "train", "preview"):
            places = ["--config", str(config), "--store", "store", "--runs", "runs", "--quiet"]
            code = run([stage, *places, *[part for each in sets for part in ("--set", each)]])
            if code:
                os._exit(code)
        os._exit(0)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
os.write(1, json.dumps(codes).encode())
"""


def experiments(round_: int) -> list[tuple[str, list[str]]]:
    """Return the runs of a round, in turn: all the same work, another LoRA each, other texts and latents each."""
    different = ([], ["train.learning_rate={n}e-4"], ["validate.trigger='word{n}'", "encode_latents.flip=true"])
    return [
        (f"run-{number}", [each.format(n=number + 1) for each in different[round_ % len(different)]])
        for number in range(PROCESSES)
    ]


@pytest.mark.bar("Q16")
def test_eight_processes_share_a_store(bench: Bench, count: Count, measured: Measured) -> None:
    rounds = count(1, ROUNDS)
    clean = 0
    bad: list[str] = []
    for round_ in range(rounds):
        bench.put(bench.after["nothing"])
        ran = bench.ask([], script=RACE.format(runs=json.dumps(experiments(round_))))
        codes = json.loads(ran.out) if ran.out.startswith("[") else []
        # Other words give other fragments: those are judged by the manifests that list them, not by the reference.
        found = half_published(bench.root, bench.reference)
        whole = [each for each in found if not each.endswith(("other bytes", "unknown"))]
        left = [path.name for path in (bench.root / "store" / ".tmp").iterdir()]
        clean += codes.count(0) if not whole and not left else 0
        bad += (
            [f"round {round_}: {codes} {whole} {left} {ran.err[-1000:]}"]
            if codes != [0] * PROCESSES
            else whole + left
        )
    measured("Q16", f"{clean} of {rounds * PROCESSES} processes clean, the whole chain each")
    assert bad == []
    assert clean == rounds * PROCESSES
