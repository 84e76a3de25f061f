"""What a kill costs: of all that was encoded by then, at most one fragment has to be encoded again."""

from __future__ import annotations

import pytest

from tests.faults.children import Bench, result
from tests.faults.conftest import Count, Measured
from tests.faults.judge import published
from tests.faults.points import calls, chosen
from tests.faults.zygote import Fault

# Fragments of two, so that a few pictures fill several; and a mark for every record that the model has encoded.
MOST_RECORDS = 2
COUNTING = """
import os, stages.{module} as module, stages.stores.fragments as fragments
fragments.MOST_RECORDS = {most}
encode = module.{function}
def counted(*arguments):
    encoded = encode(*arguments)
    marks = os.open({marks!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(marks, b"+")
    os.close(marks)
    return encoded
module.{function} = counted
"""
ENCODERS = {"encode-latents": ("_latent", "latents"), "encode-text": ("_embedding", "embeddings")}


@pytest.mark.bar("Q3")
@pytest.mark.parametrize("stage", ENCODERS)
def test_kill_costs_at_most_one_fragment(bench: Bench, stage: str, count: Count, measured: Measured) -> None:
    function, kind = ENCODERS[stage]
    marks = bench.folder / "marks"
    counting = COUNTING.format(module=stage.replace("-", "_"), function=function, most=MOST_RECORDS, marks=str(marks))
    bench.put(bench.before(stage))
    whole = bench.stage(stage, script=counting)
    total = result(whole)["counts"]["encoded"]
    assert published(bench.root / "store", kind) == total > 2 * MOST_RECORDS
    renames = [call.number for call in calls(whole.log, "w") if call.operation == "rename"]
    numbers = [number for rename in renames for number in (rename, rename + 1)]
    lost: list[int] = []
    for at in chosen(numbers, count, 3):
        marks.unlink(missing_ok=True)
        bench.put(bench.before(stage))
        bench.stage(stage, Fault(at=at, mode="kill"), script=counting)
        encoded = marks.stat().st_size if marks.exists() else 0
        kept = published(bench.root / "store", kind)
        lost.append(encoded - kept)
        again = bench.stage(stage, script=counting)
        assert result(again)["counts"].get("encoded", 0) in (0, total - kept)
    measured("Q3", f"{stage}: at most {max(lost)} records lost in {len(lost)} kills, fragments of {MOST_RECORDS}")
    assert max(lost) <= MOST_RECORDS
