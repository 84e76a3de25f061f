from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from schemas.errors import Fault
from schemas.events import VARIABLE, Event, Said
from stages.console import messages


@pytest.fixture(autouse=True)
def loud():
    yield
    messages.configure(quiet=False)


def test_people_are_told_on_stderr_and_programs_on_stdout(capsysbinary):
    messages.say("12 pictures")
    messages.result(b'{"stage":"validate"}')
    printed = capsysbinary.readouterr()
    assert printed.out == b'{"stage":"validate"}\n'
    assert printed.err == b"12 pictures\n"


def test_quiet_leaves_warnings_and_errors(capsys):
    messages.configure(quiet=True)
    messages.say("12 pictures")
    messages.table("Buckets", ["size"], [["512"]])
    messages.warn("one caption is long")
    messages.faults([Fault(code="picture.broken", what="cannot decode", where="a.png", fix="remove it")])
    assert capsys.readouterr().err.splitlines() == [
        "warning: one caption is long",
        "error[picture.broken] cannot decode (a.png). fix: remove it",
    ]


def test_every_fault_is_one_line(capsys):
    messages.faults([Fault(code=f"a.{number}", what="line\nbreak") for number in range(3)])
    assert capsys.readouterr().err.splitlines() == [f"error[a.{number}] line\\nbreak" for number in range(3)]


@pytest.mark.parametrize("say", [messages.say, messages.warn])
def test_text_from_outside_cannot_drive_the_terminal(capsys, say):
    say("\x1b[2J[red]cat[/red]\r\u202egnp.\udcff")
    printed = capsys.readouterr().err
    assert printed.endswith("\\x1b[2J[red]cat[/red]\\r\\u202egnp.\\udcff\n")
    assert printed.rstrip("\n").isprintable()


def test_a_table_is_aligned_and_escaped(capsys):
    messages.table("Buckets", ["bucket", "pictures"], [["512x512", "12"], ["[b]odd\x1b", "8"]])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.rstrip() for line in printed.err.splitlines()] == [
        "Buckets",
        "bucket      pictures",
        "512x512           12",
        "[b]odd\\x1b         8",
    ]


def test_a_wide_table_is_not_wrapped_into_a_log(capsys):
    messages.table("Captions", ["caption"], [["word " * 30]])
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_below_a_chain_messages_are_events(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    messages.say("a\nb")
    messages.warn("c")
    messages.faults([Fault(code="a.b", what="c")])
    events = [msgspec.json.decode(line, type=Event) for line in capsys.readouterr().err.splitlines()]
    assert events == [
        Said(level="info", text="a\\nb"),
        Said(level="warning", text="c"),
        Said(level="error", text="error[a.b] c"),
    ]


def test_a_line_needs_neither_rich_nor_numpy():
    program = (
        "import sys; from stages.console import messages; messages.say('hello');"
        "print('rich' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False False\n", "hello\n")
