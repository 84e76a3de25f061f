"""Bytes that are no longer those that were written: verify finds all of them, and no stage takes any for good."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import msgspec
import pytest

from schemas.errors import Damaged
from schemas.tables import EMBEDDING_INDEX, LATENT_INDEX
from stages.contract.artifacts import read_receipt, receipt_bytes
from stages.stores.embeddings import KIND, EmbeddingReader
from stages.stores.latents import LatentReader
from stages.stores.seals import open_sealed
from stages.stores.tables import read_table
from stages.training.checkpoints import newest
from stages.training.data import embedding_row, latent_row
from tests.faults.conftest import Count, Measured
from tests.stages.project import Project, new_project
from tests.stores.damage import flipped_bits, other_lengths

INTEGRITY, LINEAGE = 4, 5
SIBLING = ("run.name=dog", "run.seed=8", "validate.trigger=blip", "validate.resolutions=[48]")

Refuses = Callable[[Project], bool]


@dataclass(frozen=True)
class Kind:
    """A type of artifact: where one lies, and whether what reads it notices; `sibling` is another of its type."""

    path: Callable[[Project, str], Path]
    refuses: Refuses


def own(stage: str, name: str) -> Callable[[Project, str], Path]:
    """Return where a run's artifact of a stage keeps a file."""

    def path(project: Project, run: str) -> Path:
        receipt = read_receipt(project.root / "runs" / run, stage)
        assert receipt is not None
        return project.store / stage / receipt.key / name

    return path


def fragment(stage: str, inside: str) -> Callable[[Project, str], Path]:
    """Return where the first fragment of a run's encoder lies."""

    def path(project: Project, run: str) -> Path:
        table = LATENT_INDEX if stage == "encode-latents" else EMBEDDING_INDEX
        rows = read_table(own(stage, "index.parquet")(project, run), table)
        return project.store / rows[0]["fragment"] / inside if inside else project.store / rows[0]["fragment"]

    return path


def checkpoint(project: Project, run: str) -> Path:
    note = msgspec.json.decode((project.root / "runs" / run / "trajectory.json").read_bytes())
    return project.store / "checkpoints" / note["trajectory"] / "4" / "state.safetensors"


def stops(stage: str) -> Refuses:
    """Return whether a stage ends with damage or lineage."""
    return lambda project: project.run(stage).code in (INTEGRITY, LINEAGE)


def latents_are_refused(project: Project) -> bool:
    rows = read_table(own("encode-latents", "index.parquet")(project, "cat"), LATENT_INDEX)
    return any(is_damaged(lambda row=row: LatentReader([project.store]).read(latent_row(row))) for row in rows)


def embeddings_are_refused(project: Project) -> bool:
    rows = read_table(own("encode-text", "index.parquet")(project, "cat"), EMBEDDING_INDEX)
    return any(is_damaged(lambda row=row: EmbeddingReader([project.store]).read(embedding_row(row))) for row in rows)


def is_damaged(read: Callable[[], object]) -> bool:
    try:
        read()
    except Damaged:
        return True
    return False


def checkpoint_is_passed_over(project: Project) -> bool:
    trajectory = checkpoint(project, "cat").parents[1].name
    found = newest([project.store], trajectory, 4, lambda _: None)
    return found is None or found.step < 4


def receipt_is_written_again(project: Project) -> bool:
    """A receipt only points: what a stage finds instead of its own it replaces."""
    ran = project.run("validate")
    receipt = read_receipt(project.results, "validate")
    written = receipt is not None and (project.results / "validate.json").read_bytes() == receipt_bytes(receipt)
    return ran.code == 0 and written and receipt is not None and receipt.key == ran.result["key"]


KINDS = {
    "dataset table": Kind(own("validate", "dataset.parquet"), stops("encode-latents")),
    "captions table": Kind(own("validate", "captions.parquet"), stops("encode-text")),
    "latents": Kind(fragment("encode-latents", "c.0.0.0.0"), latents_are_refused),
    "latents' metadata": Kind(fragment("encode-latents", "zarr.json"), latents_are_refused),
    "embeddings": Kind(fragment("encode-text", ""), embeddings_are_refused),
    "latents' index": Kind(own("encode-latents", "index.parquet"), stops("train")),
    "embeddings' index": Kind(own("encode-text", "index.parquet"), stops("train")),
    "manifest": Kind(own("train", "manifest.json"), stops("preview")),
    "receipt": Kind(lambda project, run: project.root / "runs" / run / "validate.json", receipt_is_written_again),
    "checkpoint": Kind(checkpoint, checkpoint_is_passed_over),
    "LoRA": Kind(own("train", "lora.safetensors"), stops("preview")),
    "metrics": Kind(own("train", "metrics.jsonl"), stops("preview")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two finished runs in one store; each test leaves them as they were."""
    project = new_project(tmp_path_factory.mktemp("damage") / "project")
    project.make()
    project.make(sets=SIBLING)
    assert project.run("verify").code == 0
    return project


# What verify finds the other files by: by these it is kept from looking further.
POINTERS = ("manifest", "receipt")
CONTENTS = tuple(name for name in KINDS if name not in POINTERS)
# What is damaged at a time: one look has to name all of it.
TOGETHER = pytest.mark.parametrize("names", [CONTENTS, *((name,) for name in POINTERS)], ids=["contents", *POINTERS])


def wheres(project: Project) -> str:
    return " ".join(finding["where"] for finding in project.run("verify", "--quiet").result["findings"])


@pytest.mark.bar("Q7")
@TOGETHER
def test_every_flipped_bit_is_found_by_verify_and_its_file_named(
    project: Project, names: tuple[str, ...], count: Count, measured: Measured
) -> None:
    flips = count(6, 1000)
    paths = {name: KINDS[name].path(project, "cat") for name in names}
    found = dict.fromkeys(names, 0)
    for _ in zip(*(flipped_bits(path, flips) for path in paths.values()), strict=True):
        told = wheres(project)
        for name, path in paths.items():
            found[name] += str(path) in told or (name == "receipt" and bool(told))
    for name in names:
        measured("Q7", f"{name}: verify found {found[name]} of {flips}")
    assert found == dict.fromkeys(names, flips)


@pytest.mark.bar("Q7")
@pytest.mark.parametrize("name", KINDS)
def test_every_flipped_bit_is_refused_before_use(
    project: Project, name: str, count: Count, measured: Measured
) -> None:
    flips = count(4, 1000)
    path = KINDS[name].path(project, "cat")
    missed = [offset for offset in flipped_bits(path, flips) if not KINDS[name].refuses(project)]
    measured("Q7", f"{name}: its reader refused {flips - len(missed)} of {flips}")
    assert missed == []


def losses(path: Path, sibling: Path, cuts: int) -> Iterator[str]:
    """Cut, lengthen, delete and exchange a file, each undone before the next."""
    yield from (f"{length} bytes" for length in other_lengths(path, cuts))
    whole = path.read_bytes()
    path.unlink()
    yield "deleted"
    path.write_bytes(bytes(len(whole)))
    yield "zeroed"
    path.write_bytes(sibling.read_bytes())
    yield "another's"
    path.write_bytes(whole)


@pytest.mark.bar("Q8")
@TOGETHER
def test_cut_lengthened_deleted_zeroed_and_exchanged_files_are_found_by_verify_and_named(
    project: Project, names: tuple[str, ...], count: Count, measured: Measured
) -> None:
    paths = {name: (KINDS[name].path(project, "cat"), KINDS[name].path(project, "dog")) for name in names}
    tried, missed = dict.fromkeys(names, 0), list[str]()
    # Short files have fewer places to be cut at: those that are through are whole again.
    for lost in zip_longest(*(losses(*both, count(0, 100)) for both in paths.values())):
        told = wheres(project)
        for name, what in zip(names, lost, strict=True):
            tried[name] += what is not None
            # A pointer that is gone has no place: that something is wrong is said of what it points to.
            if what is not None and str(paths[name][0]) not in told and not (name in POINTERS and told):
                missed.append(f"{name}: {what}")
    for name in names:
        found = tried[name] - sum(each.startswith(f"{name}: ") for each in missed)
        measured("Q8", f"{name}: verify found {found} of {tried[name]}")
    assert missed == []


@pytest.mark.bar("Q8")
@pytest.mark.parametrize("name", KINDS)
def test_cut_lengthened_deleted_zeroed_and_exchanged_files_are_refused(
    project: Project, name: str, count: Count, measured: Measured
) -> None:
    kind = KINDS[name]
    path = kind.path(project, "cat")
    tried, missed = 0, list[str]()
    for what in losses(path, kind.path(project, "dog"), count(0, 100)):
        tried += 1
        if not kind.refuses(project):
            missed.append(what)
    measured("Q8", f"{name}: its reader refused {tried - len(missed)} of {tried}")
    assert missed == []


@pytest.mark.bar("Q11")
def test_repair_encodes_exactly_the_damaged_records_and_gives_the_same_digest(
    project: Project, tmp_path: Path, count: Count, measured: Measured
) -> None:
    tries, exact = count(3, 40), 0
    draw = random.Random(3)
    for number in range(tries):
        own_copy = project.copy(tmp_path / str(number))
        digests = {stage: own_copy.run(stage).result["digest"] for stage in ("encode-latents", "encode-text")}
        latents, texts = damaged_latents(own_copy, draw), damaged_embeddings(own_copy, draw)
        ran = own_copy.run("repair")
        after = {stage: own_copy.run(stage).result["digest"] for stage in digests}
        exact += ran.code == 0 and ran.counts["encoded"] == latents + texts and after == digests
    measured("Q11", f"{exact} of {tries}: as many encoded as damaged, digests as before")
    assert exact == tries


def damaged_latents(project: Project, draw: random.Random) -> int:
    """Flip a bit in some records of the latents' shard; return in how many."""
    path = KINDS["latents"].path(project, "cat")
    rows = read_table(own("encode-latents", "index.parquet")(project, "cat"), LATENT_INDEX)
    size = 4 * rows[0]["channels"] * rows[0]["height"] * rows[0]["width"] + 4
    chosen = draw.sample(range(len(rows)), draw.randrange(1, len(rows)))
    flipped(path, [row * size + draw.randrange(size) for row in chosen])
    return len(chosen)


def damaged_embeddings(project: Project, draw: random.Random) -> int:
    path = KINDS["embeddings"].path(project, "cat")
    groups = open_sealed(path, KIND.blame(path.name)).groups
    chosen = draw.sample(range(len(groups)), draw.randrange(1, len(groups)))
    flipped(path, [groups[row][0] + draw.randrange(groups[row][1]) for row in chosen])
    return len(chosen)


def flipped(path: Path, offsets: list[int]) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    path.write_bytes(data)
