"""Which calls of a command are failed: all that differ in kind, or so many of them, evenly spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.conftest import Count

# Threads move a call or two between runs: tried beyond the end as well, and judged by what is on disk.
BEYOND = 2
ENDS = 2


@dataclass(frozen=True)
class Call:
    """One line of the log: the number it was counted by, its side, name, result and paths."""

    number: int
    side: str
    operation: str
    result: int
    path: str
    other: str


def calls(log: str, side: str) -> list[Call]:
    """Return the calls of a side, `w` or `r`, numbered from 1 as when that side is failed."""
    found: list[Call] = []
    for line in log.splitlines():
        _, which, operation, outcome, path, other = line.split("\t")
        if which == side:
            found.append(Call(len(found) + 1, which, operation, int(outcome), path, other))
    return found


def distinct(found: Sequence[Call]) -> list[Call]:
    """Leave out the middle of a run of the same operation on the same file: dying in one of them is as in another."""
    kept: list[Call] = []
    for index, call in enumerate(found):
        near = [*found[max(index - ENDS, 0) : index], *found[index + 1 : index + 1 + ENDS]]
        inside = len(near) == 2 * ENDS and all(
            (each.operation, each.path) == (call.operation, call.path) for each in near
        )
        if not inside:
            kept.append(call)
    return kept


def chosen(numbers: Sequence[int], count: Count, sample: int) -> list[int]:
    """Return the numbers to try in this run: all of them in full, else `sample`, evenly spread."""
    most = min(count(sample, len(numbers)), len(numbers))
    return [numbers[int((index + 0.5) * len(numbers) / most)] for index in range(most)]
