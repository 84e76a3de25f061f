"""Tokens, passwords and the paths of this machine: in nothing that a command prints or writes."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from tests.faults.conftest import Measured
from tests.stages.project import Project, new_project
from tests.test_command_line import process

CANARY = "canary-7f3a9c51"
# What holds secrets where people train: hub and tracker tokens, cloud keys, a proxy with a password.
SECRETS = {
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), CANARY),
    "GITHUB_TOKEN": CANARY,
    "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
    "SSH_AUTH_SOCK": f"/nowhere/{CANARY}",
    "HF_HUB_OFFLINE": "1",
}
CHAIN = ("validate", "encode-latents", "encode-text", "train", "preview", "verify")
HELPERS = ("timesteps", "bundle", "ema", "report")
FAILING = (
    ("train", "--set", "train.rank=0"),
    ("validate", "--set", "validate.dataset=nowhere"),
    ("encode-text", "--set", "model.source=nobody/nothing", "--debug"),
    ("no-such-command",),
)
ROOT = Path(__file__).parents[2]


def said(project: Project, *arguments: str) -> str:
    environment = {**SECRETS, "HOME": str(project.root.parent / "home")}
    done = process(*arguments, cwd=project.root, **environment)
    return done.stdout + done.stderr


def commands(project: Project) -> list[tuple[str, ...]]:
    places = ("--config", project.config.name)
    listed: list[tuple[str, ...]] = [(stage, *places) for stage in CHAIN]
    listed += [("timesteps", *places), ("bundle", *places, "--output", "cat.zip")]
    listed += [("ema", *places, "--output", "smooth.safetensors"), ("report", project.name)]
    listed += [(each[0], *places, *each[1:]) if len(each) > 1 else each for each in FAILING]
    return listed


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, list[str]]:
    """A project after every command, and everything they said."""
    project = new_project(tmp_path_factory.mktemp("secrets") / "project")
    (project.root.parent / "home").mkdir()
    return project, [said(project, *arguments) for arguments in commands(project)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.bar("Q21")
def test_no_command_prints_or_writes_a_secret(told: tuple[Project, list[str]], measured: Measured) -> None:
    project, texts = told
    printed = [text for text in texts if CANARY in text]
    written = [path for path in files(project.root.parent) if CANARY.encode() in path.read_bytes()]
    measured(
        "Q21",
        f"{len(printed)} hits in what {len(texts)} commands said, {len(written)} in {len(files(project.root))} files",
    )
    assert (project.lora.is_file(), (project.root / "cat.zip").is_file()) == (True, True)
    assert printed == []
    assert written == []


@pytest.mark.bar("Q21")
def test_what_is_shared_names_no_path_and_no_user(told: tuple[Project, list[str]], measured: Measured) -> None:
    project, _ = told
    shared = [*project.results.glob("*.safetensors"), *project.results.glob("*.png"), project.root / "cat.zip"]
    shared += files(project.store / "fragments")
    private = (str(project.root), str(Path.home()), os.uname().nodename)
    found = [
        f"{path.name}: {word}"
        for path in shared
        for word in private
        if len(word) > 4 and word.encode() in path.read_bytes()
    ]
    measured("Q21", f"{len(found)} paths, homes or host names in {len(shared)} shared files")
    assert len(shared) > 8
    assert found == []


def test_nothing_here_unpickles() -> None:
    """No module that runs code it reads, and no loader that would (numpy's own refuses unless it is asked to)."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
    wrong: list[str] = []
    for path in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [each.name.split(".")[0] for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                wrong.append(f"{path.name}:{node.value.lineno} {node.arg}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                wrong.append(f"{path.name}:{node.lineno} {node.func.id}")
            wrong += [f"{path.name} imports {name}" for name in names if name in forbidden]
    assert wrong == []
