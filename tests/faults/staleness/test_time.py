"""Changes and time: clocks that are wrong, projects that move, edits while a stage works or between two of them."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from stages.console.progress import Progress
from tests.faults.conftest import Count, Measured
from tests.faults.judge import published
from tests.faults.staleness.changes import (
    FRAGMENTS,
    PICTURES,
    STAGES,
    TEXTS,
    UP_TO_DATE,
    recaptioned,
    removed,
    renamed,
    repainted,
)
from tests.stages.project import Listing, Project, Ran, contents, draw, listing

SECONDS_2100 = 4_102_444_800
ROUNDS = 3


def encoded(project: Project, *stages: str, sets: tuple[str, ...] = ()) -> tuple[int, int]:
    """Run validate and the encoders; return the latents and texts encoded, by what is newly on disk."""
    before = [published(project.store, kind) for kind in FRAGMENTS.values()]
    ran = project.make(*(stages or ("validate", *FRAGMENTS)), sets=sets)
    latents, texts = (
        published(project.store, kind) - old for kind, old in zip(FRAGMENTS.values(), before, strict=True)
    )
    said = [ran[stage].counts["encoded"] if stage in ran else 0 for stage in FRAGMENTS]
    assert said == [latents, texts]
    return latents, texts


def nothing_to_do(project: Project) -> bool:
    return {each.status for each in project.make(*STAGES).values()} == {UP_TO_DATE}


def everything(project: Project) -> Listing:
    """Return what lies in store and runs; not the locks, nor what is remembered of stats."""
    left_out = ("store/lookup", "store/.locks", "store/.tmp")
    return {
        name: entry
        for name, entry in listing(project.root).items()
        if name.startswith(("store", "runs")) and not name.startswith(left_out) and name != "store"
    }


def dated(project: Project, seconds: Callable[[int], float]) -> None:
    """Give the files of a project, in the order of their times, the time `seconds(place)`; folders as well."""
    paths = sorted(project.root.rglob("*"), key=lambda path: path.stat().st_mtime_ns)
    for place, path in enumerate(paths):
        os.utime(path, (seconds(place), seconds(place)))


# From the place of a file in the order of times to its new time, in seconds.
DATES: dict[str, Callable[[int], float]] = {
    "1970": lambda place: 1.0 + place,
    "2100": lambda place: SECONDS_2100 + place,
    "all equal": lambda _: 1_000_000_000.0,
    "reversed": lambda place: time.time() - 100 - place,
    "an hour ahead": lambda place: time.time() + 3600 + place,
}


@pytest.mark.bar("Q14")
def test_times_of_files_decide_nothing(project: Project, count: Count, measured: Measured) -> None:
    tried = list(DATES.items())[: count(2, len(DATES))]
    wrong: list[str] = []
    for number, (name, date) in enumerate(tried):
        again = partial(dated, project, date)
        again()
        before = everything(project)
        if not (nothing_to_do(project) and nothing_to_do(project) and everything(project) == before):
            wrong.append(f"{name}: something was done though nothing changed")
        wrong += [f"{name}: {each}" for each in wrong_about_an_edit(project, 100 + number, again)]
    measured("Q14", f"H15 times of files {', '.join(dict(tried))}: {len(wrong)} decisions other than with right ones")
    assert wrong == []


@pytest.mark.bar("Q14")
@pytest.mark.parametrize("now", [1.0, SECONDS_2100], ids=["1970", "2100"])
def test_clock_of_the_machine_decides_nothing(
    project: Project, now: float, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time()
    seconds, nanoseconds = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: seconds() - began + now)
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + int((now - began) * 1e9))
    before = everything(project)
    still = nothing_to_do(project) and nothing_to_do(project) and everything(project) == before
    wrong = wrong_about_an_edit(project, 150, lambda: None)
    year = time.gmtime(time.time()).tm_year
    measured("Q14", f"H15 a clock of {year}: nothing done: {still}; about an edit: {len(wrong)} wrong decisions")
    assert year in (1970, 2100)
    assert (still, wrong) == (True, [])


def wrong_about_an_edit(project: Project, red: int, after: Callable[[], None]) -> list[str]:
    """Edit one picture and take that back, `after` doing something to the files each time; return what went wrong."""
    path = project.pictures / "ada.png"
    kept = path.read_bytes()
    repainted(project, color=(red, 30, 30))
    after()
    found = encoded(project)
    path.write_bytes(kept)
    after()
    wrong = [] if found == (1, 0) else [f"an edit encoded {found} latents and texts"]
    return wrong if nothing_to_do(project) else [*wrong, "the way back was none"]


@pytest.mark.bar("Q14")
def test_place_decides_nothing_and_is_written_nowhere(project: Project, tmp_path: Path, measured: Measured) -> None:
    project.make("preview")
    project.run("verify")
    places = (str(project.root).encode(), str(tmp_path).encode())
    written = [
        name
        for name, data in contents(project.root).items()
        if name.startswith(("store", "runs"))
        and not name.startswith(("store/lookup", "store/.locks"))
        and any(place in data for place in places)
    ]
    moved = Project(Path(shutil.move(project.root, tmp_path / "elsewhere" / "and deeper")))
    before = everything(moved)
    still = nothing_to_do(moved) and everything(moved) == before
    (tmp_path / "mounted").symlink_to(moved.root)
    mounted = nothing_to_do(Project(tmp_path / "mounted"))
    measured("Q14", f"H16 moved: nothing to do {still}; by another path: {mounted}; {len(written)} files name a path")
    assert (still, mounted, written) == (True, True, [])


@pytest.mark.bar("Q14")
def test_two_experiments_on_one_store_leave_each_other_alone(
    project: Project, count: Count, measured: Measured
) -> None:
    other = replace(project, name="dog")
    text = project.config.read_text().replace("[32]", "[48]").replace('"zorb"', '"blob"').replace("1e-3", "2e-3")
    other.config.write_text(f'{text}\n[encode_latents]\ndtype = "bfloat16"\n')
    # All but the empty caption, which both have.
    assert encoded(other) == (PICTURES, TEXTS - 1)
    other.make("train")
    before = everything(project)
    rounds = count(2, ROUNDS)
    again = [nothing_to_do(each) for _ in range(rounds) for each in (project, other)]
    # And as one run, its settings changed to and fro.
    both = ("validate.resolutions=[48]", "validate.trigger=blob", "train.learning_rate=2e-3")
    for _ in range(rounds):
        for sets in ((*both, "encode_latents.dtype=bfloat16"), ()):
            again.append({each.status for each in project.make(*STAGES, sets=sets).values()} == {UP_TO_DATE})
    after = everything(project)
    same = all(after[name] == entry for name, entry in before.items() if name.startswith("store/"))
    measured("Q14", f"H17 {again.count(True)} of {len(again)} turns had nothing to do; the store as it was: {same}")
    assert all(again)
    assert same
    assert len(after) == len(before)


# What has to be encoded when a stage is asked with these: everything.
ANEW = {"encode-latents": "encode_latents.dtype=bfloat16", "encode-text": "encode_text.dtype=float32"}


def edited_meanwhile(project: Project, stage: str, at: int, edit_it: Callable[[list[str]], object]) -> Ran:
    """Run an encoder anew; when it has done `at` records, edit the dataset, given the pictures done."""
    advance, done = Progress.advance, list[str]()

    def advance_and_edit(bar: Progress, steps: int = 1, *, note: str = "") -> None:
        advance(bar, steps, note=note)
        done.append(note)
        if bar.done == at:
            edit_it(done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", advance_and_edit)
        return project.run(stage, sets=(ANEW[stage],))


def repaint_one_read(project: Project, done: list[str]) -> None:
    repainted(project, Path(done[0]).stem)


def repaint_one_unread(project: Project, done: list[str]) -> None:
    repainted(project, next(path.stem for path in project.pictures.glob("*.png") if path.name not in done))


def recaption(project: Project, _: list[str]) -> None:
    recaptioned("bob", lambda text: f"{text} and more".encode())(project)


# What is edited when, and how many records are kept. The unread one ends the work in the middle of a fragment.
MEANWHILE: dict[str, tuple[str, int, Callable[[Project, list[str]], None], int]] = {
    "a picture read before": ("encode-latents", 1, repaint_one_read, PICTURES),
    "a picture read, at the end": ("encode-latents", PICTURES, repaint_one_read, PICTURES),
    "a picture not read yet": ("encode-latents", 1, repaint_one_unread, 0),
    "a caption, at the beginning": ("encode-text", 1, recaption, TEXTS),
    "a caption, at the end": ("encode-text", TEXTS, recaption, TEXTS),
}


@pytest.mark.bar("Q14")
@pytest.mark.parametrize("name", MEANWHILE)
def test_edit_while_an_encoder_works_ends_it_and_spoils_nothing(
    project: Project, name: str, measured: Measured
) -> None:
    stage, at, edit_it, expected = MEANWHILE[name]
    kind, results = FRAGMENTS[stage], contents(project.results)
    there = published(project.store, kind)
    ran = edited_meanwhile(project, stage, at, lambda done: edit_it(project, done))
    kept = published(project.store, kind) - there
    assert (ran.code, ran.error) == (5, "input.stale" if expected else "dataset.changed")
    assert f"1 {'caption' if stage == 'encode-text' else 'picture'} changed" in ran.stderr
    assert contents(project.results) == results
    # Each record is kept under what it was made from, so that only what was edited is missing.
    again = sum(encoded(project, "validate", stage, sets=(ANEW[stage],)))
    measured("Q14", f"H18 {name}: exit {ran.code}, {kept} records kept, {again} encoded afterwards")
    assert (kept, again) == (expected, 1 if expected else PICTURES)
    assert project.make("validate", stage, sets=(ANEW[stage],))[stage].status == UP_TO_DATE


# Until which stage the chain was asked again after the edit, and what of it the next one has not seen.
COUNTED = {
    "validate": "1 picture removed, 2 pictures added, 1 picture changed, 1 caption changed",
    "encode-latents": "1 picture removed, 2 pictures added, 1 picture changed, 1 caption changed",
    "encode-text": "1 picture removed, 2 pictures added, 1 caption changed",
}


@pytest.mark.bar("Q14")
def test_edit_between_encoders_and_train_is_counted_and_named(project: Project, measured: Measured) -> None:
    for name in ("eve", "fay"):
        draw(project.pictures, name, (9, 99, 199))
    repainted(project)
    removed(project)
    recaptioned("cyd", lambda text: f"{text} with a hat".encode())(project)
    for stale, counts in COUNTED.items():
        before = everything(project)
        refused = project.run("train")
        error = refused.result["error"]
        measured("Q14", f"H19 train before {stale}: exit {refused.code}, {error['what'].partition(': ')[2]}")
        assert (refused.code, error["code"]) == (5, "input.stale")
        assert error["what"] == f"the inputs of {stale} changed since it ran: {counts}"
        assert "bob.png removed, eve.png added, fay.png added, and " in refused.stderr
        assert error["fix"].startswith(f"flux2-lora {stale} ")
        assert everything(project) == before
        project.make(stale)
    assert project.make("train")["train"].status == "built"


REFUSALS: dict[str, tuple[Callable[[Project], object], tuple[str, ...], str]] = {
    "another name": (renamed, (), "1 picture renamed (cat): ada.png renamed. fix: "),
    "a setting": (
        lambda _: None,
        ("validate.resolutions=[48]",),
        "1 setting changed (cat): validate.resolutions: [32] -> [48]. fix: ",
    ),
    "bytes that say the same": (
        recaptioned("bob", lambda text: f"{text}\n".encode()),
        (),
        "1 file changed (cat): files in the folder: as they were -> other bytes, but no picture or caption differs",
    ),
    "a picture that is none": (
        lambda p: (p.pictures / "ada.png").write_bytes(b"none"),
        (),
        "1 picture refused (cat): ada.png refused. fix: ",
    ),
    "no folder any more": (lambda p: p.pictures.rename(p.root / "gone"), (), "the dataset folder does not exist"),
}


@pytest.mark.bar("Q14")
@pytest.mark.parametrize("name", REFUSALS)
def test_train_names_what_validate_has_not_seen(project: Project, name: str, measured: Measured) -> None:
    change, sets, told = REFUSALS[name]
    change(project)
    ran = project.run("train", sets=sets)
    measured("Q14", f"H19 train after {name}: exit {ran.code}")
    assert ran.code == (2 if name == "no folder any more" else 5)
    assert told in ran.stderr


def test_ctrl_c_while_the_reasons_are_looked_for_is_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> NoReturn:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    repainted(project)
    monkeypatch.setattr("stages.outlook.reasons.look_ahead", interrupted)
    assert project.run("train").code == 128 + signal.SIGINT
