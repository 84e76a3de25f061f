"""Wrong latents under right names, every hash recomputed: only whose store it is tells, or making them again."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.inspection.depth import Depth
from tests.faults import mutants
from tests.faults.conftest import Count, Measured
from tests.stages.project import Project, new_project

RECORDS, POISONED, PERCENT = 6000, 60, 5.0
STRANGER = 12345


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = new_project(tmp_path_factory.mktemp("poison") / "project")
    project.make()
    return project


@pytest.fixture
def poisoned(finished: Project, tmp_path: Path) -> Project:
    """A run of which one latent is another picture's, and every digest says so."""
    project = finished.copy(tmp_path / "poisoned")
    latents: dict[str, np.ndarray] = {}

    def exchange(key: str, latent: np.ndarray) -> tuple[str, np.ndarray]:
        latents[key] = latent
        first = next(iter(latents.values()))
        return key, first if len(latents) == 2 else latent

    mutants.repointed(project, exchange)
    mutants.reroled(project, "encode-latents")
    for stage in ("train", "preview"):
        (project.results / f"{stage}.json").unlink()
    return project


@pytest.mark.bar("Q23")
def test_poison_is_found_by_nothing_but_making_records_again(poisoned: Project, measured: Measured) -> None:
    codes = {finding["code"] for finding in poisoned.run("verify", "--deep").result["findings"]}
    assert codes == {"stage.not_run"}
    ran = poisoned.run("verify", "--recompute", "100%")
    found = [finding["code"] for finding in ran.result["findings"]]
    measured("Q23", f"{found.count('latents.recomputed')} of 1 poisoned latent found among 4 by making all again")
    assert (ran.code, found.count("latents.recomputed")) == (4, 1)


@pytest.mark.bar("Q23")
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
def test_store_of_a_stranger_is_refused_unless_signed(
    poisoned: Project, finished: Project, tmp_path: Path, measured: Measured
) -> None:
    victim = finished.copy(tmp_path / "victim")
    shutil.rmtree(victim.store)
    os.chown(poisoned.store, STRANGER, -1)
    refused = [
        victim.run(stage, "--also", str(poisoned.store))
        for stage in ("validate", "encode-latents", "encode-text", "train", "preview", "verify")
    ]
    measured("Q23", f"{sum(ran.code == 9 for ran in refused)} of {len(refused)} stages refuse a stranger's store")
    assert [(ran.code, ran.error) for ran in refused] == [(9, "trust.store")] * 6


@pytest.mark.bar("Q23")
def test_five_percent_made_again_meet_one_percent_of_poison(count: Count, measured: Measured) -> None:
    records = list(range(RECORDS))
    poison = set(range(0, RECORDS, RECORDS // POISONED))
    depth, trials = Depth(recompute=PERCENT), count(400, 4000)
    assert len(depth.sample(records)) == 300
    met = sum(not poison.isdisjoint(depth.sample(records)) for _ in range(trials))
    missed = math.comb(RECORDS - POISONED, 300) / math.comb(RECORDS, 300)
    measured("Q23", f"{100 * met / trials:.1f} of 100 ({trials} draws; {100 * (1 - missed):.2f} by the formula)")
    assert 1 - missed >= 0.95
    # Five standard deviations of so many draws: by chance once in two million runs.
    assert abs(met / trials - (1 - missed)) < 5 * math.sqrt(missed * (1 - missed) / trials)
