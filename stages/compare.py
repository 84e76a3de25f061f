"""compare: one HTML page of several runs: what differs in their settings, their curves and pictures side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas import results
from schemas.errors import BadConfig
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import PATH, run_folder, shared
from stages.contract.publish import write_file

MOST_RUNS = 6

HELP = """Make one page of two to six runs: settings that differ, curves over each other, previews side by side.

\b
Example:
  flux2-lora compare blue-cat blue-cat-rank-4
"""


@shared("store", "also", "runs", "json", "debug")
@click.command("compare", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--output", "-o", type=PATH, help="Where the page goes.  [default: compare.html among the runs]")
@click.option("--open", "show", is_flag=True, help="Show the page in the browser.")
def COMMAND(names: tuple[str, ...], **options: Any) -> int:
    """Be the `compare` command."""
    started = time.monotonic()
    folders = [run_folder(options["runs"], name) for name in dict.fromkeys(names)]
    if not 2 <= len(folders) <= MOST_RUNS:
        why = f"expected two to six different runs, found {len(folders)}"
        fix = "flux2-lora compare RUN RUN, or flux2-lora report RUN for one"
        raise BadConfig("compare.runs", "these are not runs to compare", where=" ".join(names), why=why, fix=fix)
    from stages.pages.compare import compare_page
    from stages.pages.record import Places, read_record

    places = Places((options["store"], *options["also"]))
    page, verdict = compare_page([read_record(folder, places) for folder in folders])
    output: Path = options["output"] or options["runs"] / results.COMPARISON
    write_file(output, page.data)
    for remark in page.remarks:
        messages.say(remark)
    messages.say(verdict)
    messages.say(f"the page: {output} ({len(page.data) / 1e6:.1f} MB)")
    if options["show"]:
        click.launch(output.absolute().as_uri())
    if options["json"]:
        result = Result(
            stage="compare",
            status="built",
            key=None,
            path=str(output.absolute()),
            digest=None,
            counts={**page.counts, "bytes": len(page.data)},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
