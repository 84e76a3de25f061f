"""compare: one page of several runs, what differs, and which is the better when a number says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stages.flux2.backend import prepare
from stages.pages.compare import better
from stages.pages.figures import Figures
from stages.pages.record import Record, Training
from tests.pages.reading import Reading
from tests.stages.project import Project, Ran, command

VALIDATED = ("train.validation.every=2", "train.validation.pictures=1")


@pytest.fixture(scope="module")
def pair(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two runs in one folder, cat and dog; only to be looked at or copied."""
    project = finished.copy(tmp_path_factory.mktemp("pair") / "project")
    sets = (
        "run.name='dog'",
        "train.rank=2",
        "train.checkpoint_every=1",
        "preview.prompts=['a red [trigger]', 'a dog']",
    )
    project.make(sets=sets)
    return project


def compare(project: Project, *names: str) -> Ran:
    places = ["--store", str(project.store), "--runs", str(project.root / "runs"), "--json"]
    return command("compare", *names, *places)


def read(ran: Ran) -> Reading:
    assert ran.code == 0, ran.stderr
    return Reading(Path(ran.result["path"]).read_text(encoding="utf-8"))


def test_page_shows_what_differs_and_nothing_else(pair: Project) -> None:
    ran = compare(pair, "cat", "dog")
    page = read(ran)
    assert Path(ran.result["path"]) == pair.root / "runs" / "compare.html"
    assert page.one("h1").pieces == ["cat", "dog"]
    rows = [each.pieces for each in page.all("tr")]
    assert [each for each in rows if "." in each[0]] == [
        ["train.rank", "4", "2"],
        ["preview.prompts", "a red [trigger]", "a red [trigger], a dog"],
    ]
    assert ["steps", "4 of 4", "4 of 4"] in rows
    assert ["trained on", *2 * [prepare().name]] in rows


def test_same_prompt_stands_side_by_side_under_one_slider(pair: Project) -> None:
    ran = compare(pair, "cat", "dog")
    page = read(ran)
    assert [each.text for each in page.all("figcaption", "prompt")] == ["a red zorb", "a dog"]
    assert page.one("div", "control").attributes["data-steps"] == "0 1 2 3 4"
    assert [each.text for each in page.all("div", "gone")] == ["not drawn"]
    assert ran.counts["previews"] == 3 + 2 * 5


def test_curves_lie_over_each_other_with_a_legend(pair: Project) -> None:
    ran = compare(pair, "cat", "dog")
    page = read(ran)
    assert ran.counts["curves"] == len(page.all("figure", "panel")) == 5
    assert [each.pieces for each in page.all("ul", "legend")] == [["cat", "dog"]] * 5


def test_page_reaches_nothing_outside_itself_and_changes_nothing(pair: Project) -> None:
    page = read(compare(pair, "cat", "dog"))
    assert [each for each in page.reached if not each.startswith(("data:", "#"))] == []
    assert len(page.scripts) == 1
    assert page.handlers == []
    before = (pair.root / "runs" / "compare.html").read_bytes()
    compare(pair, "cat", "dog")
    assert (pair.root / "runs" / "compare.html").read_bytes() == before


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (["cat"], "compare.runs", "expected two to six different runs, found 1"),
        (["cat", "cat"], "compare.runs", "expected two to six different runs, found 1"),
        (["cat", "dgo"], "run.unknown", "fix: did you mean dog?"),
    ],
)
def test_what_cannot_be_compared_is_an_error(pair: Project, names: list[str], code: str, said: str) -> None:
    ran = compare(pair, *names)
    assert (ran.code, ran.error) == (2, code)
    assert said in ran.stderr


def test_runs_that_measured_are_ranked_by_the_page(encoded: Project, tmp_path: Path) -> None:
    project = encoded.copy(tmp_path / "project")
    for name, rate in (("cat", "1e-3"), ("dog", "1e-6")):
        sets = (
            f"run.name='{name}'",
            f"train.learning_rate={rate}",
            "train.steps=8",
            "preview.prompts=[]",
            *VALIDATED,
        )
        project.make("validate", "encode-latents", "encode-text", "train", sets=sets)
    ran = compare(project, "dog", "cat")
    assert "cat is the better by validation loss" in read(ran).one("p", "verdict").text
    assert "cat is the better by validation loss" in ran.stderr


def record(name: str, held_out: str) -> Record:
    training = Training({}, {"held_out": held_out}, {}, finished=True, under_way=False)
    return Record(name, Path(), (), {}, {}, training, [], None, None, Path(), [])


def figures(best: tuple[float, int] | None) -> Figures:
    return Figures(8, 8, 1.0, None, best, None, None, None, None, None)


def test_lower_validation_loss_is_the_better() -> None:
    runs = [record(name, "x") for name in ("a", "b", "c")]
    found = [figures(best) for best in ((0.5, 10), (0.25, 20), (0.75, 30))]
    assert better(runs, found) == "b is the better by validation loss: 0.25 at step 20, a comes to 0.5."
    found[0] = replace(found[0], best=(0.25, 40))
    assert "the same validation loss, 0.25" in better(runs, found)


def test_losses_on_other_pictures_are_not_compared() -> None:
    found = [figures((0.5, 10)), figures((0.25, 20))]
    assert "cannot be compared" in better([record("a", "x"), record("b", "y")], found)


def test_run_without_validation_is_named() -> None:
    found = [figures((0.5, 10)), figures(None)]
    assert better([record("a", "x"), record("b", "x")], found).startswith("b measured no validation loss")
