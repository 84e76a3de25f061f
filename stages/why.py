"""why: what changed since a stage last ran, down to the file or the setting, with old and new."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import msgspec

from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import job_of, places, shared
from stages.inspection.lineage import MAKERS

if TYPE_CHECKING:
    from stages.outlook.changes import Why

HELP = """Say why a stage would work, or that it would not: the setting, picture, caption or file that changed.

A change is followed back through the stages before to where it began. Without STAGE, all stages are told of. Nothing
is written, and no model is loaded.

\b
Example:
  flux2-lora why train --config pipelines/demo.toml
"""
TOLD = {
    "up to date": "up to date",
    "never made": "this run has not made it yet",
    "gone": "what it made is no longer in the store, or damaged",
}


def shown(found: Why) -> list[str]:
    """Return the lines for the person."""
    if found.status != "changed":
        return [f"{found.stage}: {TOLD[found.status]}"]
    return [f"{found.stage}: changed since it ran", *(f"  {each.line()}" for each in found.changes)]


@places
@shared("json", "debug")
@click.command("why", help=HELP, context_settings={"max_content_width": 118})
@click.argument("stage", required=False, type=click.Choice(MAKERS))
def COMMAND(**options: Any) -> int:
    """Be the `why` command."""
    from stages.outlook.chain import look_ahead
    from stages.outlook.changes import why

    started = time.monotonic()
    asked = MAKERS if options["stage"] is None else (options["stage"],)
    job = job_of({**options, "look_only": True})
    with TemporaryDirectory() as aside:
        ahead = look_ahead(job, Path(aside), asked[-1])
        found = [why(job, ahead, stage) for stage in asked]
    for each in found:
        for line in shown(each):
            messages.say(line)
    if options["json"]:
        changed = sum(each.status != "up to date" for each in found)
        result = Result(
            stage="why",
            status="up to date",
            key=None,
            path=None,
            digest=None,
            counts={"stages": len(found), "to_do": changed},
            seconds=round(time.monotonic() - started, 3),
            error=None,
            about={"stages": found},
        )
        messages.result(msgspec.json.encode(result))
    return 0
