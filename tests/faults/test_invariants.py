"""Every invariant of a run has a mutant that its check finds, and that no check outside its group complains about.

The numbers are those of the invariants' list. In this design three of them mean something nearer: 11 (no loops) is
an artifact under another stage, for stages are ordered and cannot loop; 29 (the log of allowed changes) is the note
of what a training began, since every change is another trajectory; 31 (signatures) is who may write to the store,
whose word counts without a signature.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from schemas.tables import CAPTIONS, LATENT_INDEX
from stages.flux2.micro import make_micro
from tests.faults import mutants
from tests.faults.conftest import Measured
from tests.faults.mutants import artifact, only
from tests.stages.project import Project, draw, edit, flip, new_project

Mutate = Callable[[Project], object]
INVARIANTS = 32


def validated(project: Project) -> Path:
    return artifact(project, "validate")


def checkpoint(project: Project) -> Path:
    return only(project.store, "checkpoints/*/2")


# number -> (what is made untrue, the codes of its group: the first must be found, no code outside may be).
MUTANTS: dict[int, tuple[Mutate, tuple[str, ...]]] = {
    1: (lambda p: shutil.rmtree(validated(p)), ("artifact.missing",)),
    2: (mutants.under_another_key, ("manifest.misplaced",)),
    3: (lambda p: mutants.with_field(validated(p) / "manifest.json"), ("manifest.unreadable",)),
    4: (lambda p: mutants.resealed(validated(p), contract=2), ("manifest.version",)),
    5: (lambda p: mutants.respaced(validated(p) / "manifest.json"), ("manifest.altered",)),
    6: (lambda p: mutants.linked(validated(p) / "report.json"), ("file.link", "file.missing")),
    7: (lambda p: flip(only(p.store, "fragments/previews/*.png")), ("file.changed",)),
    8: (lambda p: (validated(p) / "more").write_bytes(b""), ("file.unlisted",)),
    9: (lambda p: (validated(p) / "report.json").chmod(0o666), ("file.writable",)),
    10: (
        lambda p: mutants.rekeyed(
            p, f := artifact(p, "preview"), inputs={**mutants.manifest_of(f).inputs, "wand": "0" * 64}
        ),
        ("chain.input",),
    ),
    11: (mutants.under_another_stage, ("manifest.misplaced",)),
    12: (
        lambda p: mutants.retabled(artifact(p, "encode-latents"), LATENT_INDEX, lambda rows: rows[1:]),
        ("index.records", "index.count", "table.roles"),
    ),
    13: (
        lambda p: mutants.retabled(artifact(p, "encode-latents"), LATENT_INDEX, mutants.swapped_rows),
        ("latents.row",),
    ),
    14: (lambda p: mutants.refragmented(p, lambda _: b""), ("latents.size",)),
    15: (lambda p: mutants.refragmented(p, lambda data: bytes([data[0] ^ 1]) + data[1:]), ("latents.checksum",)),
    16: (
        lambda p: mutants.repointed(p, lambda key, latent: (key, np.full_like(latent, np.nan))),
        ("latents.not_finite", "table.roles"),
    ),
    17: (lambda p: mutants.other_columns(validated(p)), ("table.columns",)),
    18: (lambda p: mutants.embeddings_index(p, mutants.too_many_tokens), ("embeddings.tokens", "embeddings.row")),
    19: (lambda p: mutants.repointed(p, lambda key, latent: (key[::-1], latent)), ("index.keys",)),
    20: (lambda p: draw(p.pictures, "ada", (1, 2, 3)), ("dataset.changed",)),
    21: (
        lambda p: flip(p.root / "model" / "transformer" / "diffusion_pytorch_model.safetensors", 0.9),
        ("model.changed",),
    ),
    22: (
        lambda p: (
            [
                path.write_bytes(path.read_bytes() + b"\0")
                for path in (p.lora, artifact(p, "train") / "lora.safetensors")
            ]
            and mutants.refiled(artifact(p, "train"))
        ),
        ("tensors.trailing",),
    ),
    23: (
        lambda p: mutants.reshown(p, lambda tensors, _: mutants.without(tensors, "single_blocks.0.linear1.")),
        ("lora.targets", "lora.digest", "lora.metadata"),
    ),
    24: (
        lambda p: mutants.reshown(p, lambda tensors, _: mutants.zeroed(tensors)),
        ("lora.zero", "lora.digest", "lora.metadata"),
    ),
    25: (
        lambda p: mutants.reshown(p, lambda _, metadata: metadata.update(tensor_digest="0" * 64)),
        ("lora.metadata",),
    ),
    26: (
        lambda p: mutants.recheckpointed(
            checkpoint(p), lambda tensors: mutants.without(tensors, "optimizer.single_blocks.0.linear1.")
        ),
        ("checkpoint.incomplete",),
    ),
    27: (lambda p: mutants.rewritten_history(p, lambda lines: [*lines[:1], *lines[2:]]), ("history.steps",)),
    28: (
        lambda p: checkpoint(p).parent.rename(checkpoint(p).parent.parent / ("0" * 64)),
        ("checkpoint.missing",),
    ),
    29: (lambda p: mutants.edited(p.results / "trajectory.json"), ("trajectory.altered",)),
    30: (mutants.unfinished_and_damaged, ("file.changed", "stage.not_run")),
    31: (lambda p: p.store.chmod(0o777), ("store.writable",)),
    32: (mutants.littered, ("store.litter",)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run whose model lies in a folder of its own."""
    project = new_project(tmp_path_factory.mktemp("invariants") / "project")
    edit(project.config, "[validate]", '[model]\nsource = "model"\n\n[validate]')
    make_micro(project.root / "model")
    project.make()
    return project


def codes(project: Project) -> list[str]:
    return [finding["code"] for finding in project.run("verify", "--deep").result["findings"]]


@pytest.mark.bar("Q9")
def test_every_invariant_has_a_mutant_that_its_own_group_of_checks_finds(
    finished: Project, tmp_path: Path, measured: Measured
) -> None:
    assert codes(finished) == []
    assert list(MUTANTS) == list(range(1, INVARIANTS + 1))
    wrong: dict[int, list[str]] = {}
    for number, (mutate, group) in MUTANTS.items():
        project = finished.copy(tmp_path / str(number))
        mutate(project)
        found = codes(project)
        if group[0] not in found or not set(found) <= set(group):
            wrong[number] = found
    measured("Q9", f"{INVARIANTS - len(wrong)} of {INVARIANTS} found by their own group of checks")
    assert wrong == {}


def test_record_under_a_key_of_nothing_is_told_and_not_made_again(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    mutants.repointed(project, lambda key, latent: (key[::-1], latent))
    ran = project.run("verify", "--recompute", "100%")
    assert (ran.code, [finding["code"] for finding in ran.result["findings"]]) == (4, ["index.keys"])


MORE: dict[str, tuple[Mutate, str]] = {
    "a path that leaves the store": (
        lambda p: mutants.resealed(
            f := validated(p), files={**mutants.manifest_of(f).files, "../../../cat.toml": mutants.record(p.config)}
        ),
        "manifest.path",
    ),
    "a digest that is not that of the roles": (
        lambda p: mutants.resealed(artifact(p, "preview"), digest="0" * 64),
        "manifest.digest",
    ),
    "a receipt spelled otherwise": (lambda p: mutants.respaced(p.results / "train.json"), "receipt.unreadable"),
    "a receipt that is a link": (
        lambda p: (
            (r := p.results / "train.json").rename(p.root / "elsewhere"),
            r.symlink_to(p.root / "elsewhere"),
        ),
        "receipt.unreadable",
    ),
    "a rate that is not the schedule's": (
        lambda p: mutants.rewritten_history(
            p, lambda lines: [line.replace(b'"learning_rate":0.001', b'"learning_rate":0.002') for line in lines]
        ),
        "history.rate",
    ),
    "losses that never were": (
        lambda p: mutants.rewritten_history(
            p, lambda lines: [re.sub(rb'"loss":[^,]+', b'"loss":null', line) for line in lines]
        ),
        "history.not_finite",
    ),
    "a checkpoint of another step": (
        lambda p: mutants.recheckpointed(
            checkpoint(p), lambda t: t.update(steps=mutants.Tensor("U64", np.array(3, np.uint64)))
        ),
        "checkpoint.incomplete",
    ),
    "a latent that is all one number": (
        lambda p: mutants.repointed(p, lambda key, latent: (key, np.ones_like(latent))),
        "latents.constant",
    ),
    "a latent of another scale": (
        lambda p: mutants.repointed(p, lambda key, latent: (key, latent * 1e6)),
        "latents.unlikely",
    ),
    "a store somebody else's file lies in": (
        lambda p: os.chown(validated(p) / "report.json", 12345, -1),
        "file.owner",
    ),
    "an artifact's folder that is open to all": (lambda p: validated(p).chmod(0o777), "store.writable"),
    "a fragment's folder that is open to all": (
        lambda p: only(p.store, "fragments/latents/*").chmod(0o757),
        "store.writable",
    ),
    "remembered digests that are open to all": (
        lambda p: only(p.store, "lookup/*.sqlite").chmod(0o666),
        "file.writable",
    ),
    "a caption's id": (
        lambda p: mutants.retabled(
            validated(p), CAPTIONS, lambda rows: [{**row, "text": f"{row['text']}!"} for row in rows]
        ),
        "captions.ids",
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_more_that_bytes_do_not_show_is_found(finished: Project, tmp_path: Path, name: str) -> None:
    if "somebody else" in name and os.getuid() != 0:
        pytest.skip("only root gives files away")
    project = finished.copy(tmp_path / "project")
    mutate, code = MORE[name]
    mutate(project)
    assert code in codes(project)
