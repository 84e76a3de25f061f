"""The frame of tests that are judged by bars: how much is tried, what was measured, and the table of bars.

A test of a bar looks like this:

    @pytest.mark.bar("Q7")
    def test_flipped_bits_are_found(count: Count, measured: Measured) -> None:
        flips = count(40, 1000)                       # in the plain test run, with --full
        found = ...
        measured("Q7", f"embeddings: {found} of {flips} found")     # before the assertion, so that a failure shows it
        assert found == flips

A room with bars lists them in its own bars.py; `pytest tests/<room> --full` ends with their table. A bar passes when
every test marked with it passed; one whose tests were all skipped has not run. A test marked `full` is skipped
without --full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from tests.faults.bars import BARS as FAULTS
from tests.learning.bars import BARS as LEARNING

Count = Callable[[int, int], int]
Measured = Callable[[str, str], None]

TABLES = (FAULTS, LEARNING)
BARS = {name: required for table in TABLES for name, required in table.items()}

# The names under which a report carries them from a worker process to the one that prints.
BAR = "bar"
MEASUREMENT = "measurement"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="try everything (minutes), not a sample")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bar(name): the bar of the room's bars.py that the test is part of")
    config.addinivalue_line("markers", "full: runs with --full only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for name in marked(item):
            if name not in BARS:
                raise pytest.UsageError(f"{item.nodeid}: no bar is named {name}")
            item.user_properties.append((BAR, name))
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip("runs with --full"))


def marked(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("bar") for name in mark.args]


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> Count:
    """`count(sample, full)` is how many to try in this run."""
    tries_all = request.config.getoption("--full")
    return lambda sample, full: full if tries_all else sample


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """`measured(bar, text)` enters what the test found into the table."""

    def enter(bar: str, text: str) -> None:
        assert bar in marked(request.node), f"mark the test with @pytest.mark.bar({bar!r})"
        request.node.user_properties.append((MEASUREMENT, f"{bar} {text}"))

    return enter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    states: defaultdict[str, set[str]] = defaultdict(set)
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for report in judged(terminalreporter):
        for name, value in report.user_properties:
            if name == BAR:
                states[str(value)].add(report.outcome)
            elif name == MEASUREMENT:
                bar, _, text = str(value).partition(" ")
                texts[bar].append(text)
    if not states:
        return
    terminalreporter.section("bars")
    for table in TABLES:
        for bar, required in table.items() if states.keys() & table.keys() else ():
            terminalreporter.write_line(f"{bar:<4} {state(states[bar]):<8} required  {required}")
            for text in sorted(texts[bar]):
                terminalreporter.write_line(f"{'':<13} measured  {text}")


def judged(terminalreporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    """Yield one report for each phase that says something: every call, and what a fixture failed or skipped."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and (report.when == "call" or report.outcome != "passed"):
                yield report


def state(outcomes: set[str]) -> str:
    if "failed" in outcomes:
        return "FAILED"
    return "passed" if "passed" in outcomes else "not run"
