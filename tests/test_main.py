"""`python -m stages` as a process: what it is before the command line is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_interruption_while_it_is_imported_ends_the_program_without_a_word(tmp_path: Path) -> None:
    """Of `run`, whose Ctrl-C may meet a stage that has just begun."""
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", "stages", "--version"]
    found = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "")
