"""A stage of three files that does almost nothing, and jobs for it: what the runner is tested with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from schemas.manifest import Manifest
from schemas.run import Config
from schemas.validate import Validate
from stages.contract.artifacts import Built, Plan, restore_file
from stages.contract.digests import digest_of, sha256_file
from stages.contract.job import Flags, Job
from stages.contract.publish import publish_file, workspace
from stages.contract.runner import Outcome, run_stage

FRAGMENT = "fragments/word"
NO_FLAGS = Flags()


class Toy:
    """Writes the trigger word and the source file into its artifact, and the word into a fragment."""

    name = "toy"
    version = 1

    def __init__(self, *, blocks: bool = False) -> None:
        self.built = 0
        self._blocks = blocks

    def plan(self, job: Job) -> Plan:
        source = job.base / "source"
        word = job.config.validate.trigger
        return Plan({"word": word, "inner": {"list": [1, 2]}}, {"source": sha256_file(source)})

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        if self._blocks:
            sys.stdout.write("building\n")
            sys.stdout.flush()
            sys.stdin.readline()
        self.built += 1
        (work / "word").write_text(plan.params["word"])
        (work / "inner").mkdir()
        (work / "inner" / "source").write_bytes((job.base / "source").read_bytes())
        with workspace(job.store) as space:
            (space / "word").write_text(plan.params["word"])
            publish_file(space / "word", job.store / FRAGMENT)
        roles = {"text": digest_of("toy", [plan.params["word"], plan.inputs["source"]])}
        return Built(roles, {"total": 2, "encoded": 2}, {FRAGMENT: job.store})

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        return {"total": manifest.counts["total"], "encoded": 0}

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        if "word" in manifest.files:
            restore_file(folder / "word", job.run_folder / "word.txt", job.digests)


def toy_job(folder: Path, word: str = "zorb", run: str = "cat", *, flags: Flags = NO_FLAGS, also: str = "") -> Job:
    """Return a job in `folder`, whose source it makes; what it says and warns goes to stderr."""
    source = folder / "source"
    if not source.exists():
        source.write_text("pixels")

    def tell(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    return Job(
        config=Config(validate=Validate(dataset=".", trigger=word)),
        config_path=folder / f"{run}.toml",
        store=folder / "store",
        runs=folder / "runs",
        also=(folder / also,) if also else (),
        flags=flags,
        say=tell,
        warn=tell,
    )


def run_toy(job: Job, stage: Toy | None = None) -> Outcome:
    """Run the toy stage."""
    return run_stage(stage or Toy(), job)
