"""Errors as lines: what, where, expected vs found, the remedy; one line each, whatever comes from outside."""

from __future__ import annotations

import msgspec
import pytest

from schemas.errors import BadConfig, Damaged, Fault, StageError, Stopped, printable


def test_line_holds_all_parts_in_order() -> None:
    fault = Fault(code="a.b", what="broken", where="x.png", why="expected 1, found 2", fix="delete it")
    assert fault.line() == "error[a.b] broken (x.png): expected 1, found 2. fix: delete it"


def test_line_leaves_out_what_is_unknown() -> None:
    assert Fault(code="a.b", what="broken").line() == "error[a.b] broken"
    assert Fault(code="a.b", what="broken", fix="mend it").line() == "error[a.b] broken. fix: mend it"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Kätzchen 猫 🐈.png", "Kätzchen 猫 🐈.png"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("gnp.\u202egpj", "gnp.\\u202egpj"),
        ("a\u2028b\u200bc\u00a0d", "a\\u2028b\\u200bc\\xa0d"),
        ("\udcff.png", "\\udcff.png"),
    ],
)
def test_text_from_outside_stays_on_its_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown in Fault(code="a.b", what="broken", where=text).line()


def test_error_of_several_faults_keeps_its_kind_and_all_of_them() -> None:
    faults = [Fault(code="a.b", what=f"broken {number}") for number in range(3)]
    error = Damaged.of(faults)
    assert isinstance(error, Damaged)
    assert error.exit_code == 4
    assert error.faults == tuple(faults)
    assert str(error) == "error[a.b] broken 0"


def test_error_says_its_line() -> None:
    error = BadConfig("config.absent", "no file", where="x.toml", fix="name one")
    assert isinstance(error, StageError)
    assert str(error) == "error[config.absent] no file (x.toml). fix: name one"


def test_stopped_remembers_the_signal() -> None:
    error = Stopped(15, "stopped", fix="run again")
    assert (error.signal_number, error.faults[0].code) == (15, "run.stopped")


def test_faults_round_trip_as_json_and_refuse_unknown_fields() -> None:
    fault = Fault(code="a.b", what="broken", where="x")
    assert msgspec.json.decode(msgspec.json.encode(fault), type=Fault) == fault
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"code":"a","what":"b","fault":"mine"}', type=Fault)
