"""The frame of a page: what it forbids itself, and that nothing from outside becomes part of it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from stages.pages.template import SCRIPT, STYLE, render
from tests.pages.reading import Reading

TEMPLATES = Path(__file__).parents[2] / "stages" / "pages" / "templates"
COMPARED = {
    "records": [],
    "colors": {},
    "remarks": [],
    "steps": [],
    "grid": [],
    "panels": [],
    "figures": [],
    "differing": [],
    "inputs": [],
}


def read(verdict: str = "") -> Reading:
    return Reading(render("compare.html", **COMPARED, verdict=verdict).decode())


def test_policy_allows_the_one_script_and_no_request() -> None:
    page = read()
    [policy] = [each for each in page.all("meta") if each.attributes.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256("".join(page.one("script").parts).encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in str(policy.attributes["content"]).split("; "))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # Nothing before the policy is ruled by it.
    assert page.elements.index(policy) < min(
        page.elements.index(page.one(tag)) for tag in ("link", "style", "script")
    )


def test_whatever_people_write_is_text() -> None:
    evil = """</p></script><script>alert(1)</script><img src=x onerror="alert(1)">&amp;'"{{ 7 * 7 }}"""
    page = read(evil)
    assert page.one("p", "verdict").text == evil
    assert len(page.scripts) == 1
    assert page.handlers == []


def test_script_and_style_stand_in_the_page_as_they_are() -> None:
    page = read()
    assert "".join(page.one("script").parts) == (TEMPLATES / SCRIPT).read_text()
    assert "".join(page.one("style").parts) == (TEMPLATES / STYLE).read_text()


def test_style_and_script_ask_for_nothing() -> None:
    for name in (SCRIPT, STYLE):
        text = (TEMPLATES / name).read_text()
        assert not re.search(
            r"url\(|@import|://|fetch\(|XMLHttpRequest|import\(|sendBeacon|innerHTML|eval\(", text
        ), name


def test_missing_value_is_an_error_and_not_a_gap() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render("compare.html", **COMPARED)
