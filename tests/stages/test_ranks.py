"""Several processes launched together train one LoRA: the same numbers as one alone, the same files, one voice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stages.stores.tensors import load
from tests.stages.project import Project, edit, new_project

ROOT = Path(__file__).parents[2]
# Everything that draws: dropout, several micro-batches, a preserved class, a moving average.
DRAWS = """
gradient_accumulation = 4
ema = { decay = 0.9 }
preservation = { kind = "output", class_word = "cat" }
adapter = { dropout = 0.2 }

[preview]"""
# The order in which the sums are taken is another one.
ROUNDING = 2e-5


def ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def launch(project: Project, stage: str, *more: str, configs: Sequence[Path] = ()) -> list[subprocess.Popen[str]]:
    """Start the stage in two processes that know of each other, as mlx.launch does."""
    hosts = project.root / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(2)]))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts)}
    running: list[subprocess.Popen[str]] = []
    for rank in range(2):
        arguments = project.arguments(stage, *more)
        if configs:
            arguments[arguments.index("--config") + 1] = str(configs[rank])
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "stages", *arguments],
                env={**env, "MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=project.root,
            )
        )
    return running


def both(project: Project, stage: str, *more: str) -> list[tuple[int, str, str]]:
    """Run the stage in two processes; return exit code, stdout and stderr of each."""
    running = launch(project, stage, *more)
    told = [each.communicate(timeout=120) for each in running]
    return [(each.returncode, *text) for each, text in zip(running, told, strict=True)]


def losses(project: Project) -> list[float]:
    return [msgspec.json.decode(line)["loss"] for line in (project.results / "metrics.jsonl").open("rb")]


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: (t.data.astype(np.uint32) << 16).view(np.float32) for name, t in load(path).tensors.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = new_project(tmp_path_factory.mktemp("alone"))
    edit(project.config, "\n[preview]", DRAWS)
    project.make("validate", "encode-latents", "encode-text")
    project.copy(tmp_path_factory.mktemp("encoded") / "encoded")
    project.make("train")
    return project


@pytest.fixture
def encoded(alone: Project, tmp_path: Path) -> Project:
    """The same project, ready to train."""
    source = next(alone.root.parent.glob("encoded*")) / "encoded"
    return Project(source, alone.name).copy(tmp_path / "project")


def test_two_processes_train_what_one_trains(alone: Project, encoded: Project) -> None:
    first, second = both(encoded, "train")
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert json.loads(first[1])["counts"] == {"steps": 4, "resumed_from": 0}
    assert second[1] == ""
    np.testing.assert_allclose(losses(encoded), losses(alone), rtol=ROUNDING)
    one, two = tensors(alone.lora), tensors(encoded.lora)
    for name, factor in one.items():
        error = np.linalg.norm(two[name] - factor) / np.linalg.norm(factor)
        # Saved as bfloat16: a last bit of it may fall the other way.
        assert error < 4e-3, name
    # One process alone goes on from there: how many there are is in no key.
    assert encoded.run("train").status == "up to date"


def test_finished_training_is_up_to_date_for_both(alone: Project) -> None:
    first, second = both(alone, "train")
    assert (first[0], json.loads(first[1])["status"]) == (0, "up to date"), first[2]
    assert (second[0], second[1]) == (0, "")


def test_ctrl_c_stops_after_a_step_and_a_run_alone_goes_on(alone: Project, encoded: Project) -> None:
    running = launch(encoded, "train")
    metrics, deadline = encoded.results / "metrics.jsonl", time.monotonic() + 60
    while not metrics.is_file() or not metrics.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A terminal sends it to all processes; the second one has nothing to save and waits to be let go.
    for each in reversed(running):
        each.send_signal(signal.SIGINT)
    _, said = running[0].communicate(timeout=60)
    running[1].terminate()
    running[1].communicate(timeout=60)
    assert running[0].returncode in (0, 130), said
    ran = encoded.run("train")
    assert ran.code == 0
    np.testing.assert_allclose(losses(encoded), losses(alone), rtol=ROUNDING)


def test_lost_process_ends_the_training(encoded: Project) -> None:
    running = launch(encoded, "train", "--set", "train.steps=400")
    metrics, deadline = encoded.results / "metrics.jsonl", time.monotonic() + 60
    while not metrics.is_file() or not metrics.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running[1].kill()
    out, said = running[0].communicate(timeout=60)
    assert running[0].returncode == 7, said
    assert json.loads(out)["error"]["code"] == "train.process_lost"


def test_processes_with_other_settings_refuse(encoded: Project) -> None:
    other = encoded.config.with_name("other.toml")
    other.write_text(encoded.config.read_text().replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    first, second = launch(encoded, "train", configs=[encoded.config, other])
    out, said = second.communicate(timeout=60)
    assert second.returncode == 5, said
    assert json.loads(out)["error"]["code"] == "train.other_trajectory"
    # The launcher ends the others when one fails.
    first.kill()
    first.communicate(timeout=60)


def test_micro_batches_that_cannot_be_shared_evenly_are_an_error(encoded: Project) -> None:
    for code, out, _ in both(encoded, "train", "--set", "train.gradient_accumulation=3"):
        assert (code, json.loads(out)["error"]["code"]) == (2, "train.processes")


def test_rank_without_a_launcher_is_an_error_that_says_how_to_train_alone(
    encoded: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers of clusters set a rank for a single process too."""
    monkeypatch.setenv("PMI_RANK", "0")
    ran = encoded.run("train")
    assert (ran.code, ran.error) == (7, "train.no_processes")
    assert "unset MLX_RANK and OMPI_COMM_WORLD_RANK and PMI_RANK" in ran.result["error"]["fix"]


def test_other_stages_run_as_one_process(encoded: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    for stage in ("validate", "verify"):
        ran = encoded.run(stage)
        assert (ran.code, ran.error) == (2, "processes.one")
