"""A full disk, a failing device, an interrupted call: an error, or the right result.

An error is one of ours: exit 7 and lines with a code and a remedy. Exit 0 means that all is there. Neither leaves
anything half-published.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.children import Bench, NoShim, compiled, result
from tests.faults.conftest import Count, Measured
from tests.faults.judge import STAGES, differences, half_published
from tests.faults.points import calls, chosen, distinct
from tests.faults.test_deaths import assert_steady
from tests.faults.zygote import Answer, Fault

ERROR = re.compile(r"^error\[[a-z_.]+\] .*fix: ", re.MULTILINE)
RESOURCES = 7
# Which calls can fail so, and whether for good.
WRITE_FAULTS = {
    "no space, once": (errno.ENOSPC, ("open", "mkdir", "write", "fsync", "rename"), False),
    "no space, for good": (errno.ENOSPC, ("open", "mkdir", "write", "fsync", "rename"), True),
    "device fails, once": (errno.EIO, ("write", "fsync", "close", "rename"), False),
    "device fails, for good": (errno.EIO, ("write", "fsync", "close", "rename"), True),
    "interrupted": (errno.EINTR, ("open", "write", "fsync", "truncate"), False),
}


def in_turn(stage: str, name: str, names: Sequence[str], count: Count) -> None:
    """Skip in a plain run all but one kind of fault for each stage."""
    if count(0, 1) == 0 and names[STAGES.index(stage) % len(names)] != name:
        pytest.skip("tried with --full")


def wrong(bench: Bench, stage: str, ran: Answer, codes: tuple[int, ...]) -> list[str]:
    """Return what is wrong with how a command ended under a fault."""
    found = half_published(bench.root, bench.reference)
    if ran.code == 0 and result(ran)["digest"] != result(bench.ran[stage])["digest"]:
        found.append("exit 0 with another digest")
    if ran.code == 0 and stage != "train":
        # A training goes on without a checkpoint that could not be saved, and says so.
        found += differences(bench.root, bench.after[stage])
    if ran.code not in (0, *codes):
        found.append(f"exit {ran.code}: {ran.err[-1500:]}")
    if ran.code in codes and not ERROR.search(ran.err):
        found.append(f"exit {ran.code} without a remedy: {ran.err[-1500:]}")
    return found


@pytest.mark.bar("Q4")
@pytest.mark.parametrize("name", WRITE_FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_failing_write_is_an_error_or_harmless(
    bench: Bench, stage: str, name: str, count: Count, measured: Measured
) -> None:
    in_turn(stage, name, list(WRITE_FAULTS), count)
    number, operations, sticky = WRITE_FAULTS[name]
    assert_steady(bench, stage)
    found = {call.number: call for call in distinct(calls(bench.ran[stage].log, "w")) if call.operation in operations}
    bad: list[str] = []
    tried, ended = chosen(list(found), count, 1), {0: 0, RESOURCES: 0}
    for at in tried:
        bench.put(bench.before(stage))
        # Threads move calls by one or two: what cannot fail so is not made to. For good, everything is.
        only = "" if sticky else found[at].operation
        ran = bench.stage(stage, Fault(at=at, mode="errno", errno=number, sticky=sticky, operation=only))
        ended[ran.code] = ended.get(ran.code, 0) + 1
        bad += [f"{at}: {each}" for each in wrong(bench, stage, ran, (RESOURCES,))]
        if name == "interrupted" and ran.code != 0:
            bad.append(f"{at}: an interrupted call ended the command: {ran.err}")
    bads = len({each.partition(":")[0] for each in bad})
    measured("Q4", f"{stage}, {name}: {len(tried) - bads} of {len(tried)} right (exit codes {ended})")
    assert bad == []


def test_training_goes_on_when_its_live_log_finds_no_room(bench: Bench) -> None:
    """A line that is cut in the middle is written again with the next, and the checkpoint holds it anyway."""
    live = "runs/cat/metrics.jsonl"
    first = next(
        call for call in calls(bench.ran["train"].log, "w") if call.operation == "write" and call.path.endswith(live)
    )
    bench.put(bench.before("train"))
    for beyond in (-1, 0, 1, 2):
        bench.put(bench.before("train"))
        fault = Fault(at=first.number + beyond, mode="errno", errno=errno.ENOSPC, operation="write")
        ran = bench.stage("train", fault)
        assert ran.code == 0, ran.err
        assert wrong(bench, "train", ran, (RESOURCES,)) == []
        if "training goes on" in ran.err:
            assert differences(bench.root, bench.after["train"]) == []
            return
    pytest.fail("no write of the live log was failed")


def test_calls_can_be_failed_where_compilers_fortify_them(tmp_path: Path) -> None:
    """As Ubuntu's do unasked: its headers define `read` and `pread` already."""
    try:
        assert compiled(tmp_path, "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2").is_file()
    except NoShim as reason:
        pytest.skip(str(reason))
