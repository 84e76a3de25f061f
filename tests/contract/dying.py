"""Kill a process at a chosen one of its file operations: every moment a power cut or `kill -9` can hit, in turn."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Runs above the script: the process dies just before its n-th change or look at the file system.
HOOK = """
import os, signal, sys
def _die_at(last, events=("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "os.truncate")):
    left = [last]
    def hook(event, _):
        if event in events:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
"""


def deaths(script: str, arguments: Sequence[str], *, every: int = 1) -> Iterator[int]:
    """Run `script` again and again, killed one moment later each time (`every`-th moment), until it survives.

    The script calls `_die_at(last)` when it is ready; `last` is its first argument. Yields after each death.
    """
    moment = 1
    while True:
        command = [sys.executable, "-c", HOOK + script, str(moment), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if process.returncode == 0:
            return
        assert process.returncode == -signal.SIGKILL, process.stderr
        yield moment
        moment += every
