"""Stores of other versions of this program: each version leaves the other's alone, and sees what the other did."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stages.inspection.lineage import MAKERS
from tests.faults.conftest import Measured
from tests.faults.mutants import manifest_of, resealed, resealed_checkpoint
from tests.faults.staleness.changes import FRAGMENTS, PICTURES, STAGES, TEXTS, UP_TO_DATE, new_trained_project
from tests.stages.project import Project, command, contents, listing

# Who reads the version.
READERS = ("contract.artifacts", "contract.formats", "training.checkpoints", "outlook.changes")
REFUSED = "store.format"


@contextmanager
def next_version() -> Generator[None]:
    """Be the version after this one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in READERS:
            patch.setattr(f"stages.{module}.CONTRACT_VERSION", 2)
        yield


@contextmanager
def heedless() -> Generator[None]:
    """Be a program that looks at no store's version."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("runner", "publish"):
            patch.setattr(f"stages.contract.{module}.require_format", lambda _: None)
        yield


@pytest.fixture(scope="module")
def finished_by_the_next(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same, by the next version; only to be copied."""
    with next_version():
        return new_trained_project(tmp_path_factory.mktemp("staleness") / "project")


@pytest.fixture
def newer(finished_by_the_next: Project, tmp_path: Path) -> Project:
    """A copy of its own for each test."""
    return finished_by_the_next.copy(tmp_path / "newer")


def refusals(project: Project) -> tuple[list[str], bool]:
    """Ask every command that writes into the store; return what each said, and whether anything was touched."""
    before = listing(project.root), contents(project.root)
    said: list[str] = []
    for arguments in (*((stage,) for stage in MAKERS), *((stage, "--force") for stage in STAGES), ("quantize",)):
        ran = project.run(*arguments, sets=("model.quantize=8bit",) if arguments == ("quantize",) else ())
        said.append(f"{ran.code} {ran.error}")
        assert "--store" in ran.result["error"]["fix"]
    return said, (listing(project.root), contents(project.root)) == before


@pytest.mark.bar("Q14")
def test_raised_format_refuses_the_old_store_and_encodes_into_another(project: Project, measured: Measured) -> None:
    with next_version():
        said, untouched = refusals(project)
        checked = project.run("verify")
        another = ("--store", str(project.root / "another"))
        encoded = [project.run(stage, *another).counts.get("encoded") for stage in ("validate", *FRAGMENTS)]
        again = [project.run(stage, *another).status for stage in ("validate", *FRAGMENTS)]
    measured(
        "Q14", f"H13 format raised: {len(said)} commands, {set(said)}, untouched: {untouched}; anew {encoded[1:]}"
    )
    assert set(said) == {f"5 {REFUSED}"}
    assert untouched
    assert REFUSED in {each["code"] for each in checked.result["findings"]}
    assert (encoded, set(again)) == ([None, PICTURES, TEXTS], {UP_TO_DATE})
    # Back to the version of before: nothing was lost.
    assert {each.status for each in project.make(*STAGES).values()} == {UP_TO_DATE}


@pytest.mark.bar("Q14")
def test_store_of_a_newer_version_is_left_alone(newer: Project, project: Project, measured: Measured) -> None:
    said, untouched = refusals(newer)
    also = project.run("train", "--also", str(newer.store))
    collected = command("gc", "--store", str(newer.store), "--runs", str(newer.root / "runs"), "--delete", "--json")
    measured(
        "Q14", f"H13 a newer store: {len(said)} commands, {set(said)}, untouched: {untouched}; gc {collected.code}"
    )
    assert set(said) == {f"5 {REFUSED}"}
    assert untouched
    assert (also.code, also.error) == (5, REFUSED)
    assert (collected.code, collected.error) == (5, REFUSED)
    with next_version():
        assert {each.status for each in newer.make(*STAGES).values()} == {UP_TO_DATE}


@pytest.mark.bar("Q14")
def test_old_version_that_heeds_nothing_works_beside_the_new_one_s(newer: Project, measured: Measured) -> None:
    with heedless():
        old = [newer.run(stage).counts.get("encoded") for stage in ("validate", *FRAGMENTS)]
    with next_version():
        again = {each.status for each in newer.make(*STAGES).values()}
        found = {each["code"] for each in newer.run("verify", "--deep").result["findings"]}
    measured("Q14", f"H14 an old version at work in a new store: {old[1:]} encoded; for the new one {again}")
    assert again == {UP_TO_DATE}
    # Nobody drew previews.
    assert found == {"stage.not_run"}


def seal_checkpoint_as_old(newer: Project) -> None:
    [folder] = newer.store.glob("checkpoints/*/1")
    resealed_checkpoint(folder, contract=1)


def seal_as_old(newer: Project) -> None:
    [folder] = (newer.store / "validate").iterdir()
    assert manifest_of(folder).contract == 2
    resealed(folder, contract=1)


def say_old(newer: Project) -> None:
    (newer.store / "format").write_text("1\n")


def say_nothing(newer: Project) -> None:
    (newer.store / "format").unlink()


def say_nonsense(newer: Project) -> None:
    (newer.store / "format").write_bytes(b"\xff\xfe" * 100)


# What an old writer left in a new store, the first stage that meets it, and what that says.
OLD_WRITERS: dict[str, tuple[Callable[[Project], None], str, str]] = {
    "its checkpoint": (seal_checkpoint_as_old, "train", "checkpoint.version"),
    "its manifest": (seal_as_old, "validate", "manifest.version"),
    "its version": (say_old, "validate", REFUSED),
    "no version": (say_nothing, "validate", REFUSED),
    "no number": (say_nonsense, "validate", REFUSED),
}


@pytest.mark.bar("Q14")
@pytest.mark.parametrize("name", OLD_WRITERS)
def test_what_an_old_version_wrote_into_a_new_store_is_seen(newer: Project, name: str, measured: Measured) -> None:
    write, meets, code = OLD_WRITERS[name]
    write(newer)
    with next_version():
        first = {stage: newer.run(stage) for stage in STAGES[: STAGES.index(meets) + 1]}
        checked = newer.run("verify")
    codes = {each["code"] for each in checked.result["findings"]}
    measured(
        "Q14", f"H14 {name}: exit {first[meets].code} {first[meets].error}; verify {checked.code} {sorted(codes)}"
    )
    assert [each.code for each in first.values()] == [0] * (len(first) - 1) + [5]
    assert first[meets].error == code
    assert checked.code == 5
    assert code in codes
