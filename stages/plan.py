"""plan: what a run would do, and whether it fits, before any of it is done: work, memory, disk and time.

Nothing is written and no model is loaded; before anything ran, pictures are judged by their headers.
"""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from stages.console import messages
from stages.console.invocation import PATH, job_of, places, shared

HELP = """Say what each stage would do and what that takes: work, peak memory, disk, time. Nothing is written.

Counts are those that the stages will report. Peaks and bytes follow from shapes; times only from what this machine
has measured (earlier runs in the store, and what bench printed). Exit 7 when something cannot fit, with what would.

\b
Example:
  flux2-lora plan --config pipelines/demo.toml
  flux2-lora bench klein-base-4b --json > bench.json && flux2-lora plan -c mine.toml --bench bench.json
"""


@places
@shared("json", "quiet", "debug")
@click.command("plan", help=HELP, context_settings={"max_content_width": 118})
@click.option("--bench", type=PATH, multiple=True, metavar="FILE", help="What bench --json printed here.")
def COMMAND(**options: Any) -> int:
    """Be the `plan` command."""
    from stages.outlook.prospect import tell

    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    result, code = tell(job_of({**options, "look_only": True}), options["bench"], started)
    if options["json"]:
        messages.result(msgspec.json.encode(result))
    return code
