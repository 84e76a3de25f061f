"""The program as a process: what it is before the command line is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code", [["-m", "stages"], ["-c", "from stages.__main__ import main; main()"]])
def test_interruption_while_it_is_imported_ends_the_program_without_a_word(tmp_path: Path, code: list[str]) -> None:
    """Of `run`, whose Ctrl-C may meet a stage that has just begun, and of the program itself."""
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, *code, "--version"]
    found = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "")


def test_installed_program_is_that_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"flux2-lora": "stages.__main__:main"}
