"""repair: make again what verify finds damaged in a run, and nothing else; the digests come out as they were.

A stage is run again plainly: it compares every byte with its manifest, takes over what is whole, and makes the rest.
What was made from something else than there is now is not damage, and is left to the stages themselves.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Fault, Stale
from schemas.manifest import Result, ResultError
from stages.console import messages
from stages.console.invocation import job_of, places, shared
from stages.contract.artifacts import artifact_key, find, read_receipt
from stages.contract.job import Job
from stages.contract.runner import Stage, load_stage, run_stage
from stages.inspection.depth import Depth
from stages.inspection.lineage import MAKERS
from stages.inspection.run import inspect

HELP = """Make again what is damaged in a run: single latents and embeddings, tables, the LoRA, pictures, copies.

It runs verify first, or reads what verify found from stdin (-), and afterwards verifies again. What nothing can be
made from any more (a checkpoint's state) stays listed with its remedy. Nothing whole is made again.

\b
Example:
  flux2-lora repair --config pipelines/demo.toml
  flux2-lora verify --config pipelines/demo.toml --json | flux2-lora repair --config pipelines/demo.toml -
"""
STDIN = "-"


def errors_found(job: Job, source: str | None) -> list[Fault]:
    """Return what is wrong with the run: looked for now, or as verify printed it to `source`. Raises BadConfig."""
    if source is None:
        return [fault for _, fault in inspect(job, Depth()).sorted_errors()]
    if source != STDIN:
        raise BadConfig("usage", f"findings are read from stdin, not from {source}", fix="say -, or leave it out")
    try:
        found = msgspec.json.decode(sys.stdin.buffer.read(), type=Result)
    except UNREADABLE as error:
        fix = "flux2-lora verify --config X --json | flux2-lora repair --config X -"
        raise BadConfig(
            "repair.findings", "stdin is not what verify --json prints", why=str(error), fix=fix
        ) from error
    listed = found.findings if isinstance(found.findings, list) else []
    return listed[: found.counts.get("errors", 0)]


def mend(job: Job) -> dict[str, int]:
    """Run every stage of the run that is still what it was; return their counts together. Raises Stale."""
    counts: Counter[str] = Counter()
    # What rotted on the disk has the size and times it had: no remembered digest may speak for it.
    flags = dataclasses.replace(job.flags, paranoid=True)
    for name in MAKERS:
        fresh = dataclasses.replace(job, flags=flags, upstream={})
        stage = load_stage(name)
        if not _stands(fresh, stage):
            break
        outcome = run_stage(stage, fresh)
        if outcome.built:
            counts["stages"] += 1
            counts.update({each: outcome.counts[each] for each in ("encoded", "rendered") if each in outcome.counts})
    return dict(counts)


def _stands(job: Job, stage: Stage) -> bool:
    """Whether the run has come to this stage. Raises Stale when it was made from something else than there is now."""
    key, receipt = artifact_key(stage.name, stage.version, stage.plan(job)), read_receipt(job.run_folder, stage.name)
    if receipt is None:
        return find(stage.name, key, job.stores) is not None
    if receipt.key != key:
        raise Stale(
            "repair.changed",
            f"what {stage.name} is made from, or its settings, changed since it ran: that is no damage",
            where=job.run,
            fix=job.remedy(stage.name),
        )
    return True


@places
@shared("json", "quiet", "debug")
@click.command("repair", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.argument("findings", required=False)
def COMMAND(**options: Any) -> int:
    """Be the `repair` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    job = job_of(options)
    before = errors_found(job, options["findings"])
    made = mend(job) if before else {}
    after = inspect(job, Depth()).sorted_errors() if before else []
    left = [fault for _, fault in after]
    messages.faults(left)
    messages.say(_said(len(before), len(left), made))
    first = left[0] if left else None
    result = Result(
        stage="repair",
        status="failed" if left else "built" if before else "up to date",
        key=None,
        path=str(Path(job.run_folder).absolute()),
        digest=None,
        counts={"errors": len(before), "left": len(left), **made},
        seconds=round(time.monotonic() - started, 3),
        error=ResultError(code=first.code, what=first.what, where=first.where, fix=first.fix) if first else None,
        findings=left,
    )
    if options["json"]:
        messages.result(msgspec.json.encode(result))
    return after[0][0].exit_code if after else 0


def _said(before: int, left: int, made: dict[str, int]) -> str:
    if not before:
        return "nothing is damaged"
    told = ", ".join(f"{count} {name}" for name, count in made.items() if count)
    restored = "copies restored" if left < before else "nothing could be made again"
    return f"{before} things were wrong, {left} still are ({f'made again: {told}' if told else restored})"
