"""What is whole is never called damaged: whatever its surroundings, whatever was trained, however deep the look."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.faults.conftest import Count, Measured
from tests.stages.project import Project, edit, new_project

ROOT = Path(__file__).parents[2]
DEPTHS = ((), ("--deep",), ("--quick",), ("--subset", "1/2"), ("--recompute", "30%"))
LONG_AGO, FAR_AHEAD = 1.0, 4e9

Surrounding = Callable[[Project, Path], Project]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = new_project(tmp_path_factory.mktemp("clean") / "project")
    project.make()
    return project


def copied(project: Project, target: Path) -> Project:
    return project.copy(target / "copy")


def moved(project: Project, target: Path) -> Project:
    return Project(Path(shutil.move(copied(project, target).root, target / "moved elsewhere")))


def linked(project: Project, target: Path) -> Project:
    (target / "link").symlink_to(copied(project, target).root)
    return Project(target / "link")


def hard_linked(project: Project, target: Path) -> Project:
    shutil.copytree(project.root, target / "twin", copy_function=os.link)
    (target / "twin" / "runs" / "cat" / "verify.json").unlink(missing_ok=True)
    return Project(target / "twin")


def dated(project: Project, target: Path, when: float) -> Project:
    found = copied(project, target)
    for path in found.root.rglob("*"):
        os.utime(path, (when, when))
    return found


def read_only(project: Project, target: Path) -> Project:
    found = copied(project, target)
    for path in (*(found.root / "store").rglob("*"), *found.pictures.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return found


def flattened(project: Project, target: Path) -> Project:
    """Copy file by file, without times, owners or empty folders, as an archive does."""
    for path in project.root.rglob("*"):
        if path.is_file():
            place = target / "flat" / path.relative_to(project.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return Project(target / "flat")


SURROUNDINGS: dict[str, Surrounding] = {
    "where it was made": lambda project, _: project,
    "copied": copied,
    "moved": moved,
    "behind a link": linked,
    "hard-linked": hard_linked,
    "with times of 1970": lambda project, target: dated(project, target, LONG_AGO),
    "with times of 2096": lambda project, target: dated(project, target, FAR_AHEAD),
    "read-only": read_only,
    "without times and empty folders": flattened,
}


@pytest.mark.bar("Q10")
def test_whole_run_raises_no_alarm_wherever_it_lies(
    finished: Project, tmp_path: Path, count: Count, measured: Measured
) -> None:
    depths = DEPTHS[: count(2, len(DEPTHS))]
    alarms: list[str] = []
    for number, (name, surround) in enumerate(SURROUNDINGS.items()):
        (tmp_path / str(number)).mkdir()
        project = surround(finished, tmp_path / str(number))
        for depth in depths:
            ran = project.run("verify", *depth)
            alarms += [f"{name}, {depth}: {each['code']}" for each in ran.result["findings"]]
            alarms += [f"{name}, {depth}: exit {ran.code}"] if ran.code else []
    measured("Q10", f"{len(alarms)} of {len(SURROUNDINGS) * len(depths)} places and depths")
    assert alarms == []


ENVIRONMENTS = (
    {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"},
    {"LC_ALL": "C", "PYTHONHASHSEED": "1", "TZ": "America/St_Johns"},
    {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONHASHSEED": "2"},
    {"PYTHONUTF8": "0", "LANG": "ja_JP.eucJP"},
    {"COLUMNS": "20", "NO_COLOR": "1"},
)


@pytest.mark.bar("Q10")
def test_whole_run_raises_no_alarm_in_another_locale_zone_and_hash_seed(
    finished: Project, tmp_path: Path, count: Count, measured: Measured
) -> None:
    project = finished.copy(tmp_path / "project")
    tried = ENVIRONMENTS[: count(1, len(ENVIRONMENTS))]
    alarms = 0
    for changed in tried:
        line = [sys.executable, "-m", "stages", *project.arguments("verify", "--deep")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **changed}
        # From its own folder, by relative paths.
        line = [part.replace(f"{project.root}/", "") for part in line]
        found = subprocess.run(line, capture_output=True, check=False, cwd=project.root, env=environment)
        alarms += found.returncode != 0 or msgspec.json.decode(found.stdout)["findings"] != []
    measured("Q10", f"{alarms} of {len(tried)} environments")
    assert alarms == 0


VARIANTS: dict[str, tuple[str, ...]] = {
    "everything at once": (
        "train.ema.decay=0.9",
        "train.optimizer.kind=prodigy",
        "train.schedule.kind=cosine",
        "train.schedule.warmup_steps=2",
        "train.adapter.kind=dora",
        "encode_latents.flip=true",
        "encode_latents.dtype=bfloat16",
        "encode_text.dtype=float32",
        "validate.resolutions=[32,48]",
        'preview.prompts=["a [trigger]","two [trigger]s"]',
    ),
    "LoKr, eight bits, held-out pictures": (
        "train.adapter.kind=lokr",
        "train.optimizer.kind=adamw8bit",
        "train.validation.pictures=1",
        "train.validation.every=2",
        "train.exclude=['*mlp*']",
    ),
    "PiSSA, schedule-free, tags": (
        "train.adapter.init=pissa",
        "train.optimizer.kind=schedule_free",
        "validate.tags.variants=2",
        "train.gradient_accumulation=2",
    ),
    "Muon, overrides, class word": (
        "train.optimizer.kind=muon",
        "train.overrides=[{pattern='*qkv',rank=2,alpha=2.0}]",
        "train.preservation={kind='output',class_word='thing'}",
        "preview.prompts=[]",
    ),
    "masks, bfloat16, rotation": (
        "validate.masks=alpha",
        "train.mask.outside=0.2",
        "encode_latents.dtype=bfloat16",
        "train.checkpoint_every=1",
        "train.rotation.keep_last=1",
    ),
    "LION, float32, no pictures": ("train.optimizer.kind=lion", "train.save_dtype=float32", "preview.prompts=[]"),
    "quantized": ("model.quantize=8bit", "encode_text.quantize=4bit"),
}


@pytest.mark.full
@pytest.mark.bar("Q10")
def test_no_way_of_training_raises_an_alarm(tmp_path: Path, measured: Measured) -> None:
    tried = list(VARIANTS.items())
    alarms: list[str] = []
    for number, (name, sets) in enumerate(tried):
        project = new_project(tmp_path / str(number))
        project.make(sets=sets)
        for depth in (("--deep", "--recompute", "50%"), ("--quick",)):
            ran = project.run("verify", *depth, sets=sets)
            alarms += [f"{name}: {each['code']} {each['what']}" for each in ran.result["findings"]]
    measured("Q10", f"{len(alarms)} of {2 * len(tried)} looks at {len(tried)} ways of training")
    assert alarms == []


@pytest.mark.bar("Q10")
def test_training_that_went_on_to_more_steps_raises_no_alarm(tmp_path: Path, measured: Measured) -> None:
    project = new_project(tmp_path / "project")
    project.make()
    edit(project.config, "steps = 4", "steps = 7")
    project.make()
    ran = project.run("verify", "--deep")
    measured("Q10", f"{len(ran.result['findings'])} after a training went on from step 4 to 7")
    assert ran.result["findings"] == []
