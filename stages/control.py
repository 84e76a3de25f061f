"""control: ask a training in another terminal to pause, go on, stop, save a checkpoint or draw previews."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from schemas.control import ACTIONS, Action
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import run_folder, shared
from stages.training.control import ask

HELP = """Ask a training under way to do something between two steps; wait until it says what it did.

\b
pause       wait after the present step; signals and other requests still work
resume      go on after a pause
stop        save a checkpoint and end, as SIGTERM does (exit code 143); run it again to go on
checkpoint  save everything needed to go on from here
preview     save a checkpoint with its LoRA file and draw the preview prompts

The LoRA comes out the same, to the bit, whatever is asked.

\b
Example:
  flux2-lora control blue-cat pause
"""


@shared("runs", "json", "debug")
@click.command("control", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.argument("run")
@click.argument("action", type=click.Choice(ACTIONS))
def COMMAND(run: str, action: Action, runs: Path, *, json: bool) -> int:
    """Be the `control` command."""
    started = time.monotonic()
    answer = ask(run_folder(runs, run), action, messages.say)
    messages.say(answer.said)
    if json:
        result = Result(
            stage="control",
            status="built",
            key=None,
            path=str((runs / run).absolute()),
            digest=None,
            counts={"steps": answer.step},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
