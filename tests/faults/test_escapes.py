"""Which files the whole chain opens: its project, its libraries and the system's, and nothing else of the user's.

Watched from outside by strace where there is one, else from inside by Python's audit events.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.stages.project import Project, new_project

ROOT = Path(__file__).parents[2]
CHAIN = ("validate", "encode-latents", "encode-text", "train", "preview", "verify", "validate")
CALLS = (
    "open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,truncate"
)
CALL = re.compile(r"^\d+ +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
AUDITED = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def hear(event, given):
    if event == "open" and isinstance(given[0], str):
        writing = given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(given[2], int) else 0
        os.write(log, f"{'w' if writing else 'r'} {os.path.abspath(given[0])}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate"):
        for path in [each for each in given[:2] if isinstance(each, str)]:
            os.write(log, f"w {os.path.abspath(path)}\\n".encode())
sys.addaudithook(hear)
sys.argv = ["flux2-lora", *sys.argv[2:]]
from stages.cli import main
main()
"""
# Devices that hold nothing.
NOWHERE = ("/dev/null", "/dev/tty", "/dev/urandom")


def strace(
    log: Path, arguments: list[str], project: Project, environment: dict[str, str]
) -> Iterator[tuple[bool, Path]]:
    """Run a command; yield (whether it writes, path) of every call that succeeded, children's too."""
    command = ["strace", "-f", "-qq", "-s", "4096", "-e", f"trace={CALLS},chdir", "-o", str(log)]
    subprocess.run(
        [*command, sys.executable, "-m", "stages", *arguments],
        cwd=project.root,
        env=environment,
        check=True,
        capture_output=True,
    )
    for line in log.read_text(errors="replace").splitlines():
        found = CALL.match(line)
        if found is None or int(found["result"]) < 0:
            continue
        writes = found["name"] not in ("open", "openat", "chdir") or re.search(
            r"O_(WRONLY|RDWR|CREAT)", found["arguments"]
        )
        # Relative to a folder that is open: that folder was opened by a call of its own.
        relative = found["name"].endswith("at") and not found["arguments"].startswith("AT_FDCWD")
        for path in QUOTED.findall(found["arguments"]):
            if not relative:
                yield bool(writes), (project.root / path).resolve()


def audited(
    log: Path, arguments: list[str], project: Project, environment: dict[str, str]
) -> Iterator[tuple[bool, Path]]:
    subprocess.run(
        [sys.executable, "-c", AUDITED, log, *arguments],
        cwd=project.root,
        env=environment,
        check=True,
        capture_output=True,
    )
    for line in log.read_text().splitlines():
        yield line.startswith("w"), Path(line[2:]).resolve()


@pytest.mark.bar("Q22")
@pytest.mark.parametrize("watch", [pytest.param(strace, marks=pytest.mark.full), audited])
def test_the_chain_opens_nothing_of_the_user_s_but_its_project(tmp_path: Path, watch, measured: Measured) -> None:
    if watch is strace and shutil.which("strace") is None:
        pytest.skip("there is no strace")
    project = new_project(tmp_path / "project")
    home = tmp_path / "home"
    for secret in (".netrc", ".ssh/id_ed25519", ".aws/credentials", "Documents/letter.txt"):
        (home / secret).parent.mkdir(parents=True, exist_ok=True)
        (home / secret).write_text("private")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {
        "HOME": str(home), "TMPDIR": str(scratch), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    # matplotlib keeps its list of fonts, and makes a folder for settings.
    caches = (home / ".cache", home / ".config" / "matplotlib", scratch)
    wrong: set[str] = set()
    total = 0
    for stage in CHAIN:
        for writes, path in watch(tmp_path / f"{stage}.log", [stage, "--config", "cat.toml"], project, environment):
            total += 1
            if path.is_relative_to(project.root) or any(path.is_relative_to(each) for each in caches):
                if not (writes and path.is_relative_to(project.pictures)):
                    continue
            elif path == home / ".config" or (path in (tmp_path, home) and not writes):
                # Folders that are looked up, or synced because something new lies in them.
                continue
            elif not writes and not path.is_relative_to(tmp_path):
                # Python, libraries, fonts and what the system tells of itself.
                continue
            elif str(path).startswith((*NOWHERE, "/proc/self")):
                continue
            wrong.add(f"{'w' if writes else 'r'} {path}")
    measured("Q22", f"{watch.__name__}: {len(wrong)} of {total} paths of {len(CHAIN)} commands outside")
    assert sorted(wrong) == []
    assert total > 1000
