"""The version of a store: said by later versions only, and refused by every other."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import Stale
from stages.contract import formats
from stages.contract.formats import FORMAT, require_format
from stages.contract.publish import workspace


def publish(store: Path) -> None:
    with workspace(store):
        (store / "fragments").mkdir(exist_ok=True)


def test_first_version_says_nothing_and_takes_silent_stores_for_its_own(tmp_path: Path) -> None:
    publish(tmp_path)
    require_format(tmp_path)
    assert not (tmp_path / FORMAT).exists()


def test_later_version_says_its_number_first_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CONTRACT_VERSION", 7)
    for name in (".locks", "lookup"):
        (tmp_path / name).mkdir()
    with workspace(tmp_path):
        assert (tmp_path / FORMAT).read_text() == "7\n"
    written = (tmp_path / FORMAT).stat()
    publish(tmp_path)
    assert (tmp_path / FORMAT).stat() == written
    require_format(tmp_path)


@pytest.mark.parametrize(
    ("said", "ours", "fix"),
    [(None, 2, "use that version"), ("1\n", 2, "use that version"), ("2\n", 1, "update"), ("\0", 1, "use that")],
)
def test_store_of_another_version_is_refused_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, ours: int, fix: str
) -> None:
    publish(tmp_path)
    if said is not None:
        (tmp_path / FORMAT).write_text(said)
    before = sorted(path.stat() for path in tmp_path.rglob("*"))
    monkeypatch.setattr(formats, "CONTRACT_VERSION", ours)
    with pytest.raises(Stale, match=r"store\.format") as refusal:
        publish(tmp_path)
    assert fix in refusal.value.faults[0].fix
    assert sorted(path.stat() for path in tmp_path.rglob("*")) == before
