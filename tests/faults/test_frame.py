"""The table of bars tells the truth: a failure, a skip and a missing test each show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import bars
from tests.faults.bars import BARS

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.bar("Q1")
def test_passes(measured, count):
    measured("Q1", f"tried {count(3, 5)}")

@pytest.mark.bar("Q2")
def test_passes_too(measured):
    measured("Q2", "half of it")

@pytest.mark.bar("Q2")
def test_fails(measured):
    measured("Q2", "1 of 2")
    assert False

@pytest.fixture
def broken():
    raise OSError

@pytest.mark.bar("Q3")
def test_breaks(broken):
    pass

@pytest.mark.bar("Q4")
def test_is_skipped():
    pytest.skip("no compiler")

@pytest.mark.full
@pytest.mark.bar("Q6")
def test_runs_with_full_only(measured):
    measured("Q6", "everything")

@pytest.mark.bar("Q5")
def test_enters_another_bar(measured):
    measured("Q6", "nothing")
"""


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeconftest('pytest_plugins = ["tests.bars"]')


def table(pytester: pytest.Pytester, *options: str) -> list[str]:
    pytester.makepyfile(TESTS)
    lines = [" ".join(line.split()) for line in pytester.runpytest_subprocess(*options).outlines]
    start = next(number for number, line in enumerate(lines) if line.strip("= ") == "bars")
    return lines[start + 1 :]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_table_shows_what_passed_failed_and_did_not_run(pytester: pytest.Pytester, workers: str) -> None:
    lines = table(pytester, "-n", workers)
    states = {name: line.split()[1] for line in lines for name in BARS if line.startswith(f"{name} ")}
    assert states == dict.fromkeys(BARS, "not") | {"Q1": "passed", "Q2": "FAILED", "Q3": "FAILED", "Q5": "FAILED"}
    assert [line for line in lines if line.startswith("measured")] == [
        "measured tried 3",
        "measured 1 of 2",
        "measured half of it",
    ]


def test_full_run_tries_every_fault(pytester: pytest.Pytester) -> None:
    lines = table(pytester, "--full")
    assert {"measured tried 5", "measured everything"} <= set(lines)


def test_unknown_bar_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.bar('Q99')\ndef test_it(): pass")
    assert "no bar is named Q99" in pytester.runpytest_subprocess().stderr.str()


def test_state_of_a_bar_without_tests_is_not_run() -> None:
    assert bars.state(set()) == "not run"
