"""run: one command from a folder of pictures to a LoRA, and what it refuses before any work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.run import forwarded
from tests.stages.project import Project, Ran, command, listing, new_project

STAGES = ("validate", "encode-latents", "encode-text", "train", "preview", "verify")
TINY = ("--model", "flux2-micro", "--trigger", "zorb", "--resolution", "32", "--max-steps", "2", "--rank", "4")


def run(project: Project, *more: str) -> Ran:
    return command("run", str(project.pictures), *TINY, "--json", *more)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Pictures in the folder that commands are given in."""
    made = new_project(tmp_path / "project")
    monkeypatch.chdir(made.root)
    return made


def test_pictures_become_a_lora_and_the_same_command_again_does_nothing_twice(project: Project) -> None:
    first = run(project, "--output", "made/zorb.safetensors")
    assert first.code == 0, first.stderr
    assert (first.result["status"], first.counts) == ("built", {"stages": 6, "steps": 2})
    lora = (project.root / "made" / "zorb.safetensors").read_bytes()
    assert (project.root / "runs" / "zorb" / "zorb.safetensors").read_bytes() == lora
    (project.root / "made" / "zorb.safetensors").unlink()
    again = run(project, "--output", "made/zorb.safetensors")
    assert (again.code, again.status) == (0, "up to date")
    assert [line.split()[0] for line in again.stderr.splitlines() if line.endswith("up to date")] == [*STAGES[:-1]]
    assert (project.root / "made" / "zorb.safetensors").read_bytes() == lora


def test_stage_that_fails_ends_the_run_with_its_fault_and_exit_code(project: Project) -> None:
    os.truncate(project.pictures / "bob.png", 100)
    ran = run(project)
    assert (ran.code, ran.result["status"], ran.error) == (3, "failed", "picture.truncated")
    assert "error[picture.truncated] the picture is cut off (bob.png)" in ran.stderr
    assert "encode-latents" not in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.full)])
def test_stage_that_the_system_ends_has_a_remedy_and_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """So dies what finds no memory: by the kernel's hand, or by its own."""
    python = project.root / "python"
    dies = f'case "$*" in *"stages encode-text "*) kill -{number.value} $$;; esac'
    python.write_text(f'#!/bin/sh\n{dies}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        ran = run(project)
    assert (ran.code, ran.error) == (7, "stage.died")
    assert f"error[stage.died] the system ended encode-text: by {number.name}" in ran.stderr
    assert [line for line in ran.stderr.splitlines() if line.startswith("encode-text") and line.endswith("failed")]
    assert run(project).code == 0


def test_stage_speaks_of_the_options_of_run(project: Project) -> None:
    ran = run(project, "--batch-size", "5", "--learning-rate", "1e-50")
    assert "warning: --batch-size times train.gradient_accumulation is 5, more than the 4 items" in ran.stderr
    assert (ran.code, ran.result["status"]) == (8, "failed")
    assert ran.result["error"]["fix"].startswith("raise --learning-rate, or")
    assert f"fix: {ran.result['error']['fix']}" in ran.stderr


def test_fix_of_a_stage_can_be_typed_as_an_option_of_run(project: Project) -> None:
    ran = command("run", str(project.pictures), "--model", "flux2-micro", "--json")
    assert (ran.code, ran.error) == (3, "caption.no_trigger")
    assert ran.result["error"]["fix"] == 'set --trigger "your_word"'
    assert 'fix: set --trigger "your_word"' in ran.stderr


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("--max-steps", "0"), "Expected int >= 1, found 0. fix: correct --max-steps"),
        (("--resolution", "100"), "found [32, 100]. fix: correct --resolution"),
        (("--rank", "2048"), "found 2048. fix: correct --rank"),
        (("--validation-size", "100"), "found 100. fix: correct --validation-size"),
        (("--seed", "-1"), "found -1. fix: correct --seed"),
        (("--output", "."), "error[run.output] no name for a LoRA file (.). fix: let it end in .safetensors"),
        (("--output", "lora"), "error[run.output] no name for a LoRA file (lora). fix: let it end in .safetensors"),
        (("--output", "taken.safetensors"), "error[run.output]"),
    ],
)
def test_wrong_option_is_named_before_anything_is_written(
    project: Project, given: tuple[str, ...], found: str
) -> None:
    (project.root / "taken.safetensors").mkdir()
    before = listing(project.root)
    for more in ((), ("--plan",)):
        ran = run(project, *given, *more)
        assert ran.code == 2
        assert found in ran.stderr
    assert listing(project.root) == before


@pytest.mark.parametrize("shape", ["below a file", "below a file, deeper", "through a link", "closed"])
def test_lora_that_could_not_be_written_is_refused_before_anything_is_made(project: Project, shape: str) -> None:
    (project.root / "taken").write_text("precious")
    (project.root / "link.safetensors").symlink_to("taken")
    (project.root / "closed").mkdir(mode=0o555)
    if shape == "closed" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    output = {
        "below a file": "taken/x.safetensors",
        "below a file, deeper": "taken/a/b/x.safetensors",
        "through a link": "link.safetensors",
        "closed": "closed/x.safetensors",
    }[shape]
    before = listing(project.root)
    ran = run(project, "--output", output)
    codes = {"through a link": (2, "output.symlink"), "closed": (7, "disk.permission")}
    expected = codes.get(shape, (7, "disk.in_the_way"))
    assert (ran.code, ran.error) == expected, ran.stderr
    assert listing(project.root) == before


def test_pipeline_that_somebody_edited_is_not_overwritten(project: Project) -> None:
    path = project.root / "runs" / "lora" / "pipeline.toml"
    os.truncate(project.pictures / "bob.png", 100)
    assert (run(project).code, path.is_file()) == (3, True)
    edited = path.read_text().replace("steps = 2", "steps = 3")
    path.write_text(edited)
    refused = run(project)
    assert (refused.code, refused.error) == (2, "run.edited")
    assert path.read_text() == edited


def test_closed_terminal_stops_the_stage_unless_nohup_ignores_it() -> None:
    for ignored, code in ((False, -signal.SIGTERM), (True, -signal.SIGKILL)):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            with subprocess.Popen(["sleep", "60"]) as process:
                with forwarded(process):
                    signal.raise_signal(signal.SIGHUP)
                if ignored:
                    assert process.poll() is None
                    process.kill()
                assert process.wait() == code
        finally:
            signal.signal(signal.SIGHUP, before)
