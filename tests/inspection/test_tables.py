"""Ids of items are checked against what they stand for, in as many digests as there are items."""

from __future__ import annotations

import pytest

from schemas.tables import DATASET
from stages.contract.digests import digest_of
from stages.inspection import tables
from stages.stores.tables import read_table
from tests.stages.project import draw, new_project

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The table of four pictures, of which one lies there three times."""
    project = new_project(tmp_path_factory.mktemp("items") / "project")
    for name in ("again", "and-again"):
        draw(project.pictures, name, (200, 30, 30), "a [trigger] called ada")
    return read_table(project.make("validate")["validate"].folder / DATASET.name, DATASET)


def test_ids_of_exact_duplicates_follow(items: Rows) -> None:
    assert len(items) == 6
    assert len({row["image_sha256"] for row in items}) == 4
    assert tables._not_following(items) == []


@pytest.mark.parametrize("name", ["image_sha256", "caption_id", "item_id"])
def test_one_that_stands_for_something_else_is_named(items: Rows, name: str) -> None:
    # Of three that are alike, only together is it known which of them they are.
    single = next(row for row in items if [each["image_sha256"] for each in items].count(row["image_sha256"]) == 1)
    forged = [{**row, name: "0" * len(str(row[name]))} if row is single else row for row in items]
    assert tables._not_following(forged) == [forged[items.index(single)]["item_id"]]


def test_duplicate_whose_twins_are_gone_is_named(items: Rows) -> None:
    alike = [row for row in items if [each["image_sha256"] for each in items].count(row["image_sha256"]) == 3]
    alone = [tables._not_following([row]) for row in alike]
    assert sorted(map(len, alone)) == [0, 1, 1]


def test_wrong_ids_cost_no_more_than_right_ones(items: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counting(kind: str, value: object) -> str:
        asked.append(kind)
        return digest_of(kind, value)

    monkeypatch.setattr(tables, "digest_of", counting)
    many = [{**items[0], "item_id": f"{number:032x}", "image_sha256": f"{number:064x}"} for number in range(500)]
    assert len(tables._not_following(many)) == 500
    wrong = len(asked)
    asked.clear()
    assert tables._not_following(items) == []
    assert wrong / 500 == len(asked) / len(items) == 2
