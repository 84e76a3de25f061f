"""--profile: every phase of a step is timed, and no number of the training changes."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from stages.stores.tensors import load, tensor_digest
from stages.training.profile import COMPUTE, DRAW, READ, SAVE, Profile, rows, trace
from tests.stages.project import Project

PHASES = {"read ahead (in parallel)", "wait for data", "build graph", "compute", "record", "checkpoint", "preview"}


def events(project: Project, kind: str) -> list[dict[str, Any]]:
    found = msgspec.json.decode((project.results / "trace.json").read_bytes())["traceEvents"]
    return [event for event in found if event["ph"] == kind]


def test_profile_times_every_phase_and_changes_nothing(untrained: Project, finished: Project) -> None:
    ran = untrained.run("train", "--profile", "3")
    assert ran.code == 0
    assert tensor_digest(load(untrained.lora).tensors) == tensor_digest(load(finished.lora).tensors)
    spans = events(untrained, "X")
    assert {span["name"] for span in spans} == PHASES
    computed = [span["args"]["step"] for span in spans if span["name"] == "compute"]
    assert computed == [0, 1, 2]
    # On the CPU most of a step is computing, and building its graph is not.
    seconds = {name: sum(span["dur"] for span in spans if span["name"] == name) for name in ("compute", "record")}
    assert seconds["compute"] > 5 * seconds["record"]
    for phase in PHASES:
        assert phase in ran.stderr
    assert "profile of 3 steps" in ran.stderr
    assert all(event["args"]["active bytes"] > 0 for event in events(untrained, "C"))


def test_phases_of_a_thread_lie_within_or_after_each_other(untrained: Project) -> None:
    assert untrained.run("train", "--profile", "2").code == 0
    spans = [span for span in events(untrained, "X") if span["name"] != "read ahead (in parallel)"]
    assert len({span["tid"] for span in spans}) == 1
    spans.sort(key=lambda span: span["ts"])
    for one, other in itertools.pairwise(spans):
        inside = other["ts"] + other["dur"] <= one["ts"] + one["dur"] + 1
        after = other["ts"] >= one["ts"] + one["dur"] - 1
        assert inside or after


def test_without_the_flag_there_is_no_trace(finished: Project) -> None:
    assert not (finished.results / "trace.json").exists()


def test_profile_that_is_off_or_done_keeps_nothing() -> None:
    profile = Profile(steps=1)
    with profile.phase(SAVE):
        pass
    profile.next_step()
    with profile.phase(SAVE), profile.computing():
        pass
    assert [span.name for span in profile.spans] == [SAVE]
    off = Profile()
    items = iter([1, 2])
    assert off.waits(items) is items
    assert off.phase(SAVE) is off.phase(DRAW) is off.computing()


def test_time_of_a_phase_within_another_counts_once() -> None:
    profile = Profile(steps=1)
    with profile.phase(SAVE), profile.phase(DRAW):
        sum(range(200_000))
    inner, outer = profile.spans
    assert (inner.name, outer.name) == (DRAW, SAVE)
    assert outer.own_seconds + inner.seconds == outer.seconds
    listed = rows([*profile.spans])
    assert [row[0] for row in listed] == [DRAW, SAVE]
    shares = [float(row[4].removesuffix(" %")) for row in listed]
    assert abs(sum(shares) - 100) < 0.2


def test_reading_ahead_takes_no_share() -> None:
    profile = Profile(steps=1)
    with profile.phase(READ):
        pass
    with profile.phase(COMPUTE):
        sum(range(1000))
    assert {row[0]: row[4] for row in rows(profile.spans)} == {READ: "", COMPUTE: "100.0 %"}
    assert msgspec.json.decode(trace(profile.spans))["displayTimeUnit"] == "ms"
