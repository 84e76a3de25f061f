"""No command but `fetch` opens a socket: watched from inside by audit events, and from outside by strace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Count, Measured
from tests.stages.project import Project, edit, new_project

ROOT = Path(__file__).parents[2]
PLACES = ("--config", "cat.toml")
CHAIN = ("validate", "encode-latents", "encode-text", "train", "preview", "verify")
HELPERS = {
    "plan": PLACES, "why": ("train", *PLACES), "timesteps": PLACES, "gc": (), "repair": PLACES, "report": ("cat",),
    "ema": (*PLACES, "--output", "smooth.safetensors"), "find-lr": (*PLACES, "--steps", "10"),
    "bundle": (*PLACES, "--output", "cat.zip"), "unbundle": ("cat.zip", "--unsigned", "--output", "copy"),
}  # fmt: skip
# Local pipes between threads and children are not the network; making one is no event but of its own kind.
FORBIDDING = """
import socket, sys
def hear(event, given):
    if event.startswith("socket.") and event != "socket.__new__" or event == "urllib.Request":
        raise SystemError(f"network: {event}")
    if event == "socket.__new__" and given[1] not in (socket.AF_UNIX, -1):
        raise SystemError(f"network: {event} {given[1:]}")
sys.addaudithook(hear)
sys.argv = ["flux2-lora", *sys.argv[1:]]
from stages.cli import main
main()
"""
# Of what is called on sockets, everything that could reach beyond this machine.
CALLS = "socket,connect,bind,sendto,sendmsg,sendmmsg"
REACHING = re.compile(r"socket\((?!AF_UNIX)|sa_family=(?!AF_UNIX)")
PROXY = "http://127.0.0.1:9"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1", "HF_TOKEN": "token",
    "HTTPS_PROXY": PROXY, "HTTP_PROXY": PROXY,
}  # fmt: skip


def forbidden(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that fails at the first socket; children that Python starts anew are seen by strace only."""
    line = [sys.executable, "-c", FORBIDDING, *arguments]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(line, cwd=project.root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return new_project(tmp_path_factory.mktemp("network") / "project")


def test_hook_forbids_a_socket(project: Project) -> None:
    """It has teeth: fetch, the one that may, is stopped by it."""
    ran = forbidden(project, "fetch", "nobody/nothing")
    assert ran.returncode != 0
    assert "network: socket." in ran.stderr


@pytest.mark.bar("L14")
def test_no_command_opens_a_socket(project: Project, count: Count, measured: Measured) -> None:
    lines = [(stage, *PLACES) for stage in CHAIN] + [(name, *rest) for name, rest in HELPERS.items()]
    lines = lines[: count(3, len(lines))]
    ended = {line[0]: forbidden(project, *line) for line in lines}
    wrong = {name: ran.stderr[-500:] for name, ran in ended.items() if ran.returncode or "network:" in ran.stderr}
    measured("L14", f"audit events: {len(lines) - len(wrong)} of {len(lines)} commands end well without a socket")
    assert wrong == {}


@pytest.mark.bar("L14")
def test_model_that_is_not_here_is_not_asked_for(project: Project, tmp_path: Path, measured: Measured) -> None:
    other = new_project(tmp_path / "other")
    edit(other.config, "[validate]", '[model]\nsource = "nobody/nothing"\n\n[validate]')
    assert forbidden(other, "validate", *PLACES).returncode == 0
    ended = {stage: forbidden(other, stage, *PLACES) for stage in ("encode-latents", "encode-text", "train")}
    right = [stage for stage, ran in ended.items() if ran.returncode == 7 and "flux2-lora fetch" in ran.stderr]
    measured("L14", f"a hub id that is not here: {len(right)} of {len(ended)} stages end with 7 and name fetch")
    assert right == list(ended)


@pytest.mark.full
@pytest.mark.bar("L14")
def test_no_process_of_the_chain_makes_a_call_that_reaches_out(tmp_path: Path, measured: Measured) -> None:
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    project, log = new_project(tmp_path / "project"), tmp_path / "log"
    reached: list[str] = []
    total = 0
    for stage in CHAIN:
        line = ["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-o", str(log), sys.executable, "-m", "stages"]
        environment = {**os.environ, **ENVIRONMENT}
        subprocess.run([*line, stage, *PLACES], cwd=project.root, env=environment, capture_output=True, check=True)
        called = log.read_text(errors="replace").splitlines()
        total += len(called)
        reached += [f"{stage}: {each}" for each in called if REACHING.search(each)]
    measured("L14", f"strace: {len(reached)} of {total} calls on sockets reach out, in six stages and their children")
    assert reached == []
