"""A hundred thousand pictures are no trouble: time, memory and files, each stage a process of its own.

The latents are made up, which takes a tenth of the time; everything else is as it always is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from schemas import results
from stages import encode_latents
from stages.contract import digests
from stages.contract.digests import StatCache
from stages.dataset.decoder import Decoders
from stages.flux2.variants import MICRO
from stages.stores.fragments import FULL_RECORDS
from stages.stores.tensors import TENSOR_DIGEST, load
from stages.training.checkpoints import Snapshot, list_checkpoints, write_checkpoint
from stages.training.step import STEPS
from tests.faults.conftest import Count, Measured
from tests.stages.project import MAKING, Project, edit, listing, new_project

# All in one process: what one test makes in minutes the others use.
pytestmark = pytest.mark.xdist_group("sizes")

PICTURES = 100_000
CHECKPOINTS = 1_000
# From the end of the first stage.
SETTLED_SECONDS = 600
STAGES = (("validate",), ("encode-latents",), ("encode-text",), ("train",), ("preview",), ("verify", "--quick"))


@dataclass(frozen=True)
class Cost:
    """What one process took; `busy_seconds` leave out what it waited for, such as other work on this machine."""

    seconds: float
    busy_seconds: float
    peak_bytes: int


@dataclass
class Many:
    """A finished run of many pictures, what validating them took, and how long storing their latents."""

    project: Project
    pictures: int
    validated: Cost
    seconds: float = 0.0
    made: float = field(default_factory=time.time)
    files: dict[str, int] = field(default_factory=dict[str, int])


MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "stages", *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def spawn(project: Project, *stage: str) -> Cost:
    """Run a stage as people do, and expect it to end well; its memory is that of its largest process."""
    arguments = project.arguments(stage[0], *stage[1:])
    started = time.monotonic()
    # A process between: Linux counts what the process that starts another held as the other's, too.
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    processor_seconds, peak = map(float, told.split())
    # Linux counts in kilobytes, macOS in bytes.
    peak_bytes = int(peak) * (1 if sys.platform == "darwin" else 1024)
    return Cost(time.monotonic() - started, processor_seconds, peak_bytes)


def paint(project: Project, number: int, *, changed: bool = False) -> Path:
    """Write and return a picture of 32 x 32, different from all others, and write one of ten captions."""
    folder = project.pictures / f"{number // 1000:03}"
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (32, 32), (number >> 16, number >> 8 & 255, number & 255))
    picture.putpixel((0, 0), (255, 255, 255) if changed else (0, 0, 0))
    path = folder / f"{number:06}.png"
    picture.save(path, compress_level=1)
    path.with_suffix(".txt").write_text(f"a [trigger] number {number % 10}")
    return path


def made_up(_job: object, _autoencoder: object, each: Any) -> np.ndarray:
    """Return a latent [C, H/16, W/16] float32 that follows from its key."""
    shape = (MICRO.autoencoder.packed_channels, each.item["bucket_height"] // 16, each.item["bucket_width"] // 16)
    return np.random.default_rng(int(each.key[:16], 16)).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, count: Count) -> Iterator[Many]:
    project = new_project(tmp_path_factory.mktemp("many") / "project")
    edit(project.config, "steps = 4", "steps = 2")
    pictures = count(200, PICTURES)
    for path in project.pictures.iterdir():
        path.unlink()
    for number in range(pictures):
        paint(project, number)
    made = Many(project, pictures, spawn(project, "validate"))
    made.files["validate"] = stored(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_latents, "_latent", made_up)
        # Of fewer pictures fewer files are many.
        patch.setattr(encode_latents, "MANY_FILES", encode_latents.MANY_FILES * pictures // PICTURES)
        ran = project.make(*MAKING[1:])
        made.seconds = ran["encode-latents"].result["seconds"]
        made.files["preview"] = stored(project)
        yield made


def stored(project: Project) -> int:
    return sum(path.is_file() for path in project.store.rglob("*"))


@pytest.mark.bar("M4")
def test_many_pictures_are_validated_in_time_memory_and_few_files(many: Many, measured: Measured) -> None:
    seconds, peak_bytes = many.validated.seconds, many.validated.peak_bytes
    measured(
        "M4",
        f"{many.pictures} pictures: validate {seconds:.1f} s ({many.validated.busy_seconds:.1f} of work), "
        f"{peak_bytes / 1e6:.0f} MB, {many.files['validate']} files in the store, {many.files['preview']} after all "
        f"stages; encode-latents with made-up latents {many.seconds:.1f} s",
    )
    assert seconds <= 120
    assert peak_bytes < 1e9
    assert max(many.files.values()) <= 2000
    assert len(list((many.project.store / "fragments" / "latents").iterdir())) == ceil(many.pictures / FULL_RECORDS)


def asked(project: Project) -> tuple[list[Cost], list[str]]:
    """Ask every stage once; return what each took, and the files that any of them changed."""
    before = listing(project.store) | listing(project.results, "verify.json")
    costs = [spawn(project, *stage) for stage in STAGES]
    after = listing(project.store) | listing(project.results, "verify.json")
    return costs, sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.bar("Q15")
@pytest.mark.bar("M6")
def test_up_to_date_chain_of_many_pictures_is_quick_and_writes_nothing(many: Many, measured: Measured) -> None:
    costs, changed = asked(many.project)
    # What was made a moment ago is remembered by the first look after it has settled.
    while changed and time.time() - many.made < SETTLED_SECONDS:
        costs, changed = asked(many.project)
    seconds, busy_seconds = sum(each.seconds for each in costs), sum(each.busy_seconds for each in costs)
    quick = costs[-1]
    measured("Q15", f"{many.pictures} pictures: {busy_seconds:.2f} s of work, {seconds:.2f} s for six processes")
    measured(
        "M6", f"{many.pictures} pictures: verify --quick {quick.busy_seconds:.2f} s, {quick.seconds:.2f} s in all"
    )
    assert changed == []
    assert busy_seconds <= 15
    assert quick.busy_seconds <= 10


@pytest.mark.bar("M5")
def test_of_many_pictures_only_the_changed_one_is_worked_on(
    many: Many, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    inspect = Decoders.inspect

    def counted(decoders: Decoders, folder: Path, names: Sequence[str], *, glance: bool = False) -> object:
        decoded.extend(names)
        return inspect(decoders, folder, names, glance=glance)

    monkeypatch.setattr(Decoders, "inspect", counted)
    changed = paint(many.project, many.pictures // 2, changed=True)
    started = time.monotonic()
    ran = many.project.make("validate", "encode-latents")
    counts, seconds = ran["encode-latents"].counts, time.monotonic() - started
    assert decoded == [changed.relative_to(many.project.pictures).as_posix()]
    assert counts == {"total": many.pictures, "encoded": 1, "reused": many.pictures - 1}
    decoded.clear()
    for path in (changed, changed.with_suffix(".txt")):
        path.rename(path.with_stem("renamed"))
    assert many.project.make("validate")["validate"].status == "built"
    assert decoded == []
    many.project.make("validate", sets=("validate.max_megapixels=63",))
    assert len(decoded) == many.pictures
    measured("M5", f"1 of {many.pictures} decoded and encoded, {seconds:.1f} s; renamed 0; under another limit all")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, count: Count) -> tuple[Project, int]:
    """A run with a checkpoint of every one of its steps, all but the first two made up."""
    project = new_project(tmp_path_factory.mktemp("long") / "project")
    edit(project.config, "steps = 4", "steps = 2")
    edit(project.config, "checkpoint_every = 2", "checkpoint_every = 1")
    edit(project.config, "rank = 4", 'rank = 1\ntargets = "attention"')
    edit(project.config, 'prompts = ["a red [trigger]"]', "prompts = []")
    project.make("validate", "encode-latents", "encode-text", "train")
    (folder,) = (project.store / "checkpoints").iterdir()
    last, most = list_checkpoints([project.store], folder.name)[-1], count(20, CHECKPOINTS)
    lora, state, metrics = load(last.lora), dict(last.state()), last.metrics()
    metadata = {name: text for name, text in lora.metadata.items() if name != TENSOR_DIGEST}
    (first, changing), *_ = lora.tensors.items()
    for step in range(3, most + 1):
        metrics.append({**metrics[-1], "step": step})
        state[STEPS] = replace(state[STEPS], data=np.array(step, np.uint64))
        # No two may hold the same numbers: nothing would have been learnt between.
        data = np.append(np.ravel(changing.data)[1:], np.array(step, changing.data.dtype)).reshape(
            changing.data.shape
        )
        tensors = {**lora.tensors, first: replace(changing, data=data)}
        snapshot = Snapshot(
            step, public=True, state=state, lora=tensors, ema=None, metadata=metadata, metrics=metrics
        )
        made = write_checkpoint(project.store, folder.name, snapshot)
        shutil.copyfile(made.lora, project.results / results.checkpoint(step))
    edit(project.config, "\nsteps = 2\nbatch", f"\nsteps = {most}\nbatch")
    return project, most


@pytest.mark.bar("M7")
def test_many_checkpoints_are_no_burden(long: tuple[Project, int], measured: Measured) -> None:
    project, checkpoints = long
    # Nothing is remembered of any checkpoint, then all of it.
    costs = {"finish": spawn(project, "train"), "ask again": spawn(project, "train")}
    edit(project.config, f"\nsteps = {checkpoints}\n", f"\nsteps = {checkpoints + 1}\n")
    costs["one step more"] = spawn(project, "train")
    project.make("preview")
    costs["verify --quick"] = spawn(project, "verify", "--quick")
    assert project.results.joinpath(results.checkpoint(checkpoints + 1)).is_file()
    told = ", ".join(f"{name} {each.seconds:.1f} s ({each.busy_seconds:.1f} of work)" for name, each in costs.items())
    measured("M7", f"{checkpoints} checkpoints: {told}")
    assert max(each.busy_seconds for each in costs.values()) <= 5


@pytest.mark.bar("M7")
def test_digests_of_many_checkpoints_are_remembered_in_few_writes(
    long: tuple[Project, int], measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write waits for the disk: one a checkpoint were half a minute."""
    project, checkpoints = long
    (project.store / "lookup" / "digests.sqlite").unlink()
    writes: list[int] = []
    remember = StatCache._remember

    def counted(cache: StatCache, rows: Sequence[tuple[str, str, str]]) -> None:
        writes.append(len(rows))
        remember(cache, rows)

    monkeypatch.setattr(StatCache, "_remember", counted)
    # The files were made a moment ago.
    monkeypatch.setattr(digests, "RACY_NS", 0)
    assert project.make("train")["train"].status == "up to date"
    measured("M7", f"{sum(writes)} digests in {len(writes)} writes")
    assert sum(writes) > 2 * checkpoints
    assert len(writes) <= 20
