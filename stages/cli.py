"""The command line: one command per stage and helper, found by name; errors become lines and exit codes."""

from __future__ import annotations

import importlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec

from schemas.errors import BadConfig, Fault, NoResources, StageError, Stopped
from schemas.manifest import Result, ResultError
from stages.contract.config import load_config
from stages.contract.job import Flags, Job
from stages.contract.runner import Outcome, load_stage, run_stage

# Shown by --help without importing a verb.
STAGES = {
    "validate": "Open, decode, hash and bucket every picture; list every fault.",
    "encode-latents": "Encode the pictures with the autoencoder.",
    "encode-text": "Encode captions and preview prompts with the text encoder.",
    "train": "Train the LoRA; resumes by itself.",
    "preview": "Draw pictures from the saved LoRA at every checkpoint.",
    "verify": "Check every file from the LoRA back to the pictures.",
}
HELPERS = {
    "run": "Pictures in, LoRA out: write the pipeline and run its six stages.",
}
TABLES = {
    "validate": "reads the dataset folder; writes dataset.parquet and captions.parquet",
    "encode-latents": "reads validate's tables and the pictures; writes latents (Zarr) and index.parquet",
    "encode-text": "reads captions, prompts; writes embeddings (Parquet) and index.parquet",
    "train": "reads latents and embeddings; writes the LoRA, checkpoints, metrics and curves",
    "preview": "reads saved LoRAs and prompt embeddings; writes preview_<step>.png",
    "verify": "reads everything the run stands on; writes verify.json",
}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 118}


class Commands(click.Group):
    """Finds commands by name; imports a verb only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the stages in their order, then the helpers."""
        return [*STAGES, *HELPERS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, or None for an unknown name."""
        if cmd_name in STAGES:
            return _stage_command(cmd_name)
        if cmd_name in HELPERS:
            return importlib.import_module(f"stages.{cmd_name.replace('-', '_')}").COMMAND
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with one line each."""
        for title, rows in (("Stages", STAGES), ("Helpers", HELPERS)):
            with formatter.section(title):
                formatter.write_dl(list(rows.items()))


def _stage_command(name: str) -> click.Command:
    options = [
        click.Option(["--config", "-c"], required=True, type=click.Path(path_type=Path), help="The pipeline's TOML file."),
        click.Option(["--set", "assignments"], multiple=True, metavar="A.B=C", help="Override one setting; repeatable."),
        click.Option(["--store"], type=click.Path(path_type=Path), envvar="FLUX2_LORA_STORE", default=Path("store"), show_default=True, help="Folder of artifacts, shared by all runs."),
        click.Option(["--also"], type=click.Path(path_type=Path), multiple=True, help="Another store to read from; repeatable."),
        click.Option(["--runs"], type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of results."),
        click.Option(["--force"], is_flag=True, help="Do the work again even if it is done."),
        click.Option(["--explain"], is_flag=True, help="Say what changed since last time, then run."),
        click.Option(["--wait"], is_flag=True, help="Wait for another process instead of failing."),
        click.Option(["--paranoid"], is_flag=True, help="Read every file again; trust no remembered digest."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print errors only."),
        click.Option(["--debug"], is_flag=True, help="Show tracebacks."),
    ]  # fmt: skip
    if name == "train":
        options.append(click.Option(["--resume-only"], is_flag=True, help="Refuse to start a new trajectory (exit 5)."))
    if name == "verify":
        options.append(click.Option(["--quick"], is_flag=True, help="Presence, sizes and manifests only."))
    example = f"\b\nExample:\n  flux2-lora {name} --config pipelines/demo.toml"
    return click.Command(
        name,
        params=list[click.Parameter](options),
        callback=partial(_run_stage, name),
        help=f"{STAGES[name]}\n\nIt {TABLES[name]}.\n\n{example}",
        short_help=STAGES[name],
        context_settings=CONTEXT,
    )


def _run_stage(name: str, /, **options: Any) -> None:
    started = time.monotonic()
    as_json: bool = options.pop("as_json")
    debug: bool = options.pop("debug")
    quiet: bool = options.pop("quiet")
    from stages.console import messages

    messages.configure(quiet=quiet)
    finish = partial(_fail, name, started, as_json=as_json, debug=debug)
    try:
        _print_result(_result(name, started, options, quiet=quiet), as_json=as_json)
    except StageError as error:
        sys.exit(finish(error))


def _result(name: str, started: float, options: dict[str, Any], *, quiet: bool) -> Result:
    job = _job(options, quiet=quiet)
    if name == "verify":
        return importlib.import_module("stages.verify").run(job)
    stage = load_stage(name)
    with _signals(name):
        outcome = run_stage(stage, job)
    return _as_result(name, outcome, started)


def _job(options: dict[str, Any], *, quiet: bool) -> Job:
    from stages.console import messages

    flags = ("force", "explain", "wait", "resume_only", "quick", "paranoid")
    return Job(
        config=load_config(options["config"], options["assignments"]),
        config_path=options["config"],
        store=options["store"],
        runs=options["runs"],
        also=options["also"],
        flags=Flags(quiet=quiet, **{flag: options.get(flag, False) for flag in flags}),
        say=messages.say,
        warn=messages.warn,
    )
