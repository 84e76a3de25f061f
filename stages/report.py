"""report: one HTML page about a run: previews, curves, dataset, settings, the chain of digests, timings.

It only reads what the run left, and says what is missing; the page needs no other file and no network.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas import results
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import PATH, run_folder, shared
from stages.contract.publish import write_file

HELP = """Make one page about a run: previews with a slider, curves, dataset, settings, and what was made of what.

The page is a single file that works anywhere, without a network. A training under way has one as well.

\b
Example:
  flux2-lora report demo
"""


@shared("store", "also", "runs", "json", "debug")
@click.command("report", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.argument("run")
@click.option("--output", "-o", type=PATH, help="Where the page goes.  [default: report.html in the run's folder]")
@click.option("--config", "-c", type=PATH, help="The pipeline's TOML file; it knows where the pictures are.")
@click.option("--open", "show", is_flag=True, help="Show the page in the browser.")
def COMMAND(run: str, **options: Any) -> int:
    """Be the `report` command."""
    started = time.monotonic()
    folder = run_folder(options["runs"], run)
    from stages.pages.record import Places, read_record
    from stages.pages.report import report_page

    stores = (options["store"], *options["also"])
    page = report_page(read_record(folder, Places(stores, options["config"])))
    output: Path = options["output"] or folder / results.REPORT
    write_file(output, page.data)
    for remark in page.remarks:
        messages.say(remark)
    messages.say(f"the page: {output} ({len(page.data) / 1e6:.1f} MB)")
    if options["show"]:
        click.launch(output.absolute().as_uri())
    if options["json"]:
        result = Result(
            stage="report",
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
