"""Names, links and shapes of folders (group I): a clear line for each that cannot be used, no shell ever, no hang."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataset.corpus import png
from tests.stages.project import Project, command, draw, new_project

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "with space", "quo'te", 'double"quote', "$(touch CANARY)", "`touch CANARY`", ";touch CANARY;", "-rf", "#hash",
    "100%s", "star*", "que?tion", "[brackets]", "tilde~", "back\\slash", "new\nline", "\x1b[31mred", "gnp.\u202egpj",
    "&& touch CANARY", "|touch CANARY", "{a,b}", "é", "猫🐈",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return new_project(tmp_path / "project")


def codes(project: Project) -> dict[str, str]:
    """Return exit 3's findings, file to code, once every line is seen to be printable and to have a remedy."""
    ran = project.run("validate")
    assert ran.code == 3, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error[")]
    assert len(lines) == len(ran.result["findings"])
    assert all("fix: " in line and line.isprintable() for line in lines)
    return {finding["where"]: finding["code"] for finding in ran.result["findings"]}


def test_hostile_names_are_plain_names_and_reach_no_terminal_and_no_shell(project: Project) -> None:
    for number, name in enumerate(HOSTILE):
        draw(project.pictures, name, (9, 90, number), f"called {number}")
        shutil.copyfile(project.pictures / "ada.png", project.pictures / f"{name}2.png")
    found = codes(project)
    assert set(found.values()) == {"caption.missing"}
    assert len(found) == len(HOSTILE)
    for name in HOSTILE:
        (project.pictures / f"{name}2.png").unlink()
    ran = project.make("validate", "encode-latents", "encode-text")
    assert ran["encode-latents"].counts["encoded"] == len(HOSTILE) + 4
    assert all(line.isprintable() for each in ran.values() for line in each.stderr.splitlines())
    assert not list(project.root.rglob("CANARY*"))


def test_bytes_that_are_not_utf8_in_places_and_arguments_are_refused_by_name(tmp_path: Path) -> None:
    project = new_project(tmp_path / os.fsdecode(b"caf\xe9"))
    plain = new_project(tmp_path / "plain")
    elsewhere = os.fsdecode(b"sto\xe9")
    for arguments, spelled in (
        (project.arguments("validate"), "caf\\xe9"),
        (plain.arguments("validate", "--set", f"validate.trigger={elsewhere}"), "sto\\xe9"),
        (plain.arguments("validate", "--set", f"validate.dataset={elsewhere}"), "sto\\xe9"),
        ([elsewhere, "--json"], "sto\\xe9"),
    ):
        ran = command(*arguments)
        assert (ran.code, ran.error) == (2, "usage"), ran.stderr
        assert spelled in ran.stderr


def test_place_that_begins_in_a_folder_of_another_spelling_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = new_project(tmp_path / os.fsdecode(b"caf\xe9"))
    monkeypatch.chdir(project.root)
    ran = command("validate", "--config", project.config.name, "--json")
    assert (ran.code, ran.error) == (2, "usage.path")
    assert "caf\\xe9/cat.toml is not UTF-8" in ran.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_LORA_STORE", os.fsdecode(b"sto\xe9"))
    ran = command("validate", "--config", str(new_project(tmp_path / "plain").config), "--json")
    assert (ran.code, ran.error) == (2, "usage.path")


@pytest.mark.parametrize("option", ["--store", "--runs", "--config", "--also"])
@pytest.mark.parametrize(("path", "why"), [("", "it is empty"), ("d/" * 3000, "too long"), ("n" * 256, "too long")])
def test_path_that_names_nothing_is_refused_before_anything_is_written(
    project: Project, option: str, path: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    before = sorted(project.root.rglob("*"))
    ran = command("validate", "--json", "--config", str(project.config), option, path)
    assert (ran.code, ran.error) == (2, "usage.path")
    assert option in ran.stderr
    assert why in ran.stderr
    assert len(ran.stderr) < 500
    assert sorted(project.root.rglob("*")) == before


def test_results_among_the_pictures_are_refused_before_anything_is_written(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second run would take the first one's store and previews for pictures and captions.
    monkeypatch.chdir(project.pictures)
    before = sorted(project.root.rglob("*"))
    for arguments in (
        ("run", ".", "--model", "flux2-micro"),
        ("validate", "--config", "../cat.toml"),
        ("validate", "--config", "../cat.toml", "--store", "../store"),
        ("validate", "--config", "../cat.toml", "--set", "validate.dataset=.", "--store", "../s", "--runs", "../r"),
    ):
        ran = command(*arguments, "--json")
        assert (ran.code, ran.error) == (2, "dataset.not_apart"), ran.stderr
        assert "--store and --runs" in ran.stderr
        assert sorted(project.root.rglob("*")) == before
    ran = command("validate", "--config", "../cat.toml", "--store", "../store", "--runs", "../runs", "--json")
    assert ran.code == 0, ran.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_hostile_project_path_goes_through_make(tmp_path: Path) -> None:
    # make itself splits at spaces and expands dollars: those are its own, and the program gets what it leaves.
    folder = tmp_path / "a;touch CANARY;'b"
    folder.mkdir()
    for name in ("Makefile", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    project = new_project(tmp_path / "plain")
    shutil.copytree(project.pictures, folder / "pictures")
    shutil.copyfile(project.config, folder / "cat.toml")
    line = ["make", "-n", "validate", "RUN=cat.toml", "SET=train.steps=3;touch${IFS}CANARY"]
    subprocess.run(line, cwd=folder, capture_output=True, check=False, timeout=60)
    assert not list(tmp_path.rglob("CANARY"))


def test_names_and_links_that_cannot_be_used_are_each_refused(project: Project) -> None:
    folder, outside = project.pictures, project.root / "outside"
    outside.mkdir()
    draw(outside, "far", (1, 2, 3))
    (folder / "passwd.png").symlink_to("/etc/passwd")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "far.png").symlink_to(outside / "far.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "folder").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(folder)
    server.bind("socket.png")
    os.chdir(here)
    draw(folder, "Ada", (5, 5, 5))
    draw(folder, "cafe\u0301", (6, 5, 5))
    draw(folder, "caf\u00e9", (7, 5, 5))
    (folder / "bob.jpg").write_bytes(png())
    with (folder / os.fsdecode(b"latin\xe9.png")).open("wb") as file:
        file.write(png())
    started = time.monotonic()
    found = codes(project)
    server.close()
    assert time.monotonic() - started < 10
    expected = {
        "passwd.png": "link.outside", "zero.png": "link.outside", "far.png": "link.outside",
        "loop.png": "link.broken", "gone.png": "link.broken", "folder": "link.folder",
        "pipe.png": "file.not_regular", "socket.png": "file.not_regular", "Ada.png": "name.twins",
        "bob.txt": "picture.ambiguous", "latin\\xe9.png": "name.not_utf8",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert [code for name, code in found.items() if "caf" in name].count("name.twins") == 2


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("metadata.jsonl", '{"file_name": "../../etc/passwd", "text": "x"}', "caption.no_picture"),
        ("metadata.jsonl", '{"file_name": "/etc/passwd", "text": "x"}', "caption.no_picture"),
        ("metadata.csv", "file_name,text\n../outside/far.png,x\n", "caption.no_picture"),
        ("metadata.jsonl", '{"file_name": "ada.png", "text": "x"}', "caption.ambiguous"),
        ("metadata.csv", 'file_name,text\neve.png,"a"\neve.png,"b"\n', "caption.ambiguous"),
    ],
)
def test_table_names_pictures_of_the_dataset_once_each_and_nothing_else(
    project: Project, name: str, text: str, code: str
) -> None:
    draw(project.root / "outside", "far", (1, 2, 3))
    if "eve" in text:
        (project.pictures / "eve.png").write_bytes(png())
    (project.pictures / name).write_text(text)
    assert code in codes(project).values()


def test_hidden_files_and_those_of_other_systems_are_passed_over(project: Project) -> None:
    for name in (".DS_Store", "._ada.jpg", "Thumbs.db", ".hidden.png", "desktop.ini"):
        (project.pictures / name).write_bytes(b"\0\1\2")
    assert project.make("validate")["validate"].counts["images"] == 4


def test_link_within_the_dataset_is_its_file(project: Project) -> None:
    (project.pictures / "eve.png").symlink_to("ada.png")
    (project.pictures / "eve.txt").write_text("the same again")
    ran = project.make("validate")["validate"]
    assert (ran.counts["accepted"], ran.counts["warnings"]) == (5, 1)


def test_name_of_255_bytes_works_and_a_path_too_long_is_an_error(project: Project) -> None:
    draw(project.pictures, "n" * 251, (3, 3, 3))
    assert project.make("validate", "encode-latents")["encode-latents"].counts["total"] == 5
    ran = project.run("validate", sets=(f"validate.dataset={'d/' * 3000}",))
    assert (ran.code, ran.error) == (2, "dataset.absent")
    prior = ("train.preservation={kind='prior'}", f"validate.class_dataset={'d/' * 3000}")
    ran = project.run("validate", sets=prior)
    assert (ran.code, ran.error) == (2, "dataset.class_folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished training; only to be copied."""
    project = new_project(tmp_path_factory.mktemp("trained") / "project")
    project.make("validate", "encode-latents", "encode-text", "train")
    return project


@pytest.mark.parametrize("name", ["train.json", "validate.json", "metrics.jsonl", "verify.json"])
def test_pipe_where_a_result_lies_keeps_nobody_waiting(trained: Project, tmp_path: Path, name: str) -> None:
    project = trained.copy(tmp_path / "project")
    (project.results / name).unlink(missing_ok=True)
    os.mkfifo(project.results / name)
    places = ("--store", str(project.store), "--runs", str(project.root / "runs"))
    started = time.monotonic()
    assert command("report", project.name, *places, "--json").code == 0
    # What it cannot read it must not take for nothing that is used.
    assert command("gc", *places, "--json").code == (4 if name in ("train.json", "validate.json") else 0)
    for ran in (project.run("why", "train"), project.run("plan"), project.run("verify")):
        assert ran.code in (0, 4, 5), ran.stderr
    assert time.monotonic() - started < 30


PLANTED: dict[str, Callable[[Project], Path]] = {
    "lora": lambda project: project.lora,
    "receipt": lambda project: project.results / "validate.json",
    "sibling": lambda project: project.results / f".{project.lora.name}.tmp",
}


@pytest.mark.parametrize("where", PLANTED)
def test_link_planted_where_a_result_goes_is_not_followed(project: Project, where: str, tmp_path: Path) -> None:
    project.make("validate", "encode-latents", "encode-text")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = PLANTED[where](project)
    planted.unlink(missing_ok=True)
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(victim)
    for stage in ("validate", "train"):
        project.run(stage)
    assert victim.read_text() == "precious"
