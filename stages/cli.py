"""The command line: one command per stage and helper, found by name; errors become lines and exit codes."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import click
import msgspec

from schemas.errors import GIVEN, BadConfig, StageError, Stale, Stopped, legible
from schemas.manifest import Result, ResultError, in_order
from schemas.version import VERSION
from stages.console import messages
from stages.console.invocation import PATH, SHARED, job_of, option, place_options, repeated
from stages.console.streams import silence, steady
from stages.contract.job import Job
from stages.contract.launch import launched_rank
from stages.contract.publish import no_resources
from stages.contract.runner import Findings, Parallel, follow_stage, load_stage, run_stage

# Shown by --help without importing a verb.
STAGES = {
    "validate": "Open, decode, hash and bucket every picture; list every fault.",
    "encode-latents": "Encode the pictures with the autoencoder.",
    "encode-text": "Encode captions and preview prompts with the text encoder.",
    "train": "Train the LoRA; resumes by itself.",
    "preview": "Draw pictures from the saved LoRA at every checkpoint.",
    "verify": "Check every file from the LoRA back to the pictures.",
}
# The chain, looking at it, keeping it, sharing it, building.
HELPERS = {
    "run": "Pictures in, LoRA out: write the pipeline and run its six stages.",
    "fetch": "Bring a model's files from the Hugging Face hub.",
    "quantize": "Pack a model's weights once, for all runs that hold them so.",
    "control": "Ask a training under way to pause, go on, stop, save or draw.",
    "plan": "Say what each stage would do, and whether it fits: memory, disk, time.",
    "why": "Say what changed since a stage ran: the file or setting, old and new.",
    "timesteps": "Show which noise levels a configuration trains.",
    "find-lr": "Try rising learning rates on the cached latents, and suggest one.",
    "report": "Make one page about a run: previews, curves, dataset, settings.",
    "compare": "Make one page of several runs side by side.",
    "repair": "Make again what is damaged in a run, and nothing else.",
    "ema": "Average the checkpoints of a training into one LoRA.",
    "gc": "Show, or delete, what no run uses any more.",
    "bundle": "Pack what train needs, without the pictures, for another machine.",
    "unbundle": "Check a bundle and lay it out as a project.",
    "sign": "Sign what a store holds, so that others may take it.",
    "bench": "Measure training steps on this machine, with random weights.",
    "pretrain": "Make a small FLUX.2 from nothing, by a recipe.",
}
TABLES = {
    "validate": "reads the dataset folder; writes dataset.parquet and captions.parquet",
    "encode-latents": "reads validate's tables and the pictures; writes latents (Zarr) and index.parquet",
    "encode-text": "reads captions, prompts; writes embeddings (Parquet) and index.parquet",
    "train": "reads latents and embeddings; writes the LoRA, checkpoints, metrics and curves",
    "preview": "reads saved LoRAs and prompt embeddings; writes preview_<step>.png",
    "verify": "reads everything the run stands on; writes verify.json",
}
FLAGS = {
    "force": SHARED["force"][1]["help"],
    "explain": "Say what changed since last time, then run.",
    "wait": "Wait for another process instead of failing.",
    "paranoid": "Read every file again; trust no remembered digest.",
}
OWN_FLAGS = {
    "train": {"resume-only": "Refuse to start a new trajectory (exit 5)."},
    "verify": {
        # Taken as by every stage: make gives all of them the same.
        "force": "Changes nothing here: verify looks every time.",
        "explain": "Changes nothing here: flux2-lora why says what changed.",
        "wait": "Changes nothing here: verify waits for nobody.",
        "quick": "Look at presence, sizes and manifests only.",
        "deep": "Decode every record, and validate the dataset again.",
    },
}
OWN_OPTIONS = {
    "train": [
        click.Option(
            ["--profile"], type=click.IntRange(0, 10_000), metavar="N", default=0, help="Time the first N steps."
        )
    ],
    "verify": [
        click.Option(["--subset"], metavar="N/T|P%", default="", help="Read one part of T, or a random share."),
        click.Option(
            ["--recompute"], metavar="P%", default="", help="Make a random share of records and steps again."
        ),
        click.Option(["--model"], default="", help="Judge FILE on this model: a short name, a folder or a hub id."),
        click.Argument(["file"], required=False, type=PATH),
    ],
}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 118}


class Commands(click.Group):
    """Finds commands by name; imports a verb only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the stages in their order, then the helpers."""
        return [*STAGES, *HELPERS]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names. Raises BadConfig with the nearest name."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], names, n=1)
            fix = f"did you mean {near[0]}?" if near else "flux2-lora --help"
            raise BadConfig("usage", f"no such command {args[0]}", why=f"valid: {', '.join(names)}", fix=fix)
        return super().resolve_command(ctx, args)

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


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001
    if value:
        click.echo(f"flux2-lora {VERSION}")
        ctx.exit()


def _stage_command(name: str) -> click.Command:
    example = f"\b\nExample:\n  flux2-lora {name} --config pipelines/demo.toml"
    flags = {**FLAGS, **OWN_FLAGS.get(name, {})}
    return click.Command(
        name,
        params=[
            *place_options(config_required=name != "verify"),
            *(click.Option([f"--{flag}"], is_flag=True, help=text) for flag, text in flags.items()),
            *OWN_OPTIONS.get(name, []),
            *map(option, ("json", "quiet", "debug")),
        ],
        callback=partial(_run_stage, name),
        help=f"{STAGES[name]}\n\nIt {TABLES[name]}.\n\n{example}",
        short_help=STAGES[name],
        context_settings=CONTEXT,
    )


def _run_stage(name: str, /, **options: Any) -> int:
    """Run one stage; return the exit code."""
    started = time.monotonic()
    as_json: bool = options.pop("json")
    messages.configure(quiet=options["quiet"])
    with _interruptible():
        if name == "verify" and (options["file"] is not None or options["config"] is None):
            result, code = importlib.import_module("stages.verify").judge_file(options)
            return _tell(result, code, as_json=as_json)
        job = job_of(options)
        if launched_rank():
            follow_stage(name, job)
            return 0
        # A disk can fail at any call, not only where something is published.
        with no_resources(job.store):
            result, code = _result(name, job, started)
    return _tell(result, code, as_json=as_json)


def _tell(result: Result, code: int, *, as_json: bool) -> int:
    if as_json:
        messages.result(msgspec.json.encode(result))
    else:
        messages.say(_summary(result))
    return code


def _result(name: str, job: Job, started: float) -> tuple[Result, int]:
    if name == "verify":
        return importlib.import_module("stages.verify").run(job)
    stage = load_stage(name)
    try:
        outcome = run_stage(stage, job)
    except Stale as error:
        from stages.outlook.reasons import explained

        raise explained(error, job) from error
    if launched_rank() is not None and isinstance(stage, Parallel):
        stage.dismiss()
    findings = stage.findings(outcome.folder) if isinstance(stage, Findings) else msgspec.UNSET
    result = Result(
        stage=name,
        status="built" if outcome.built else "up to date",
        key=outcome.manifest.key,
        path=str(outcome.folder.absolute()),
        digest=outcome.manifest.digest,
        counts=dict(outcome.counts),
        seconds=round(time.monotonic() - started, 3),
        error=None,
        findings=findings,
    )
    return result, 0


def _summary(result: Result) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in in_order(result.counts))
    return f"{result.stage}: {result.status} ({counts}) in {result.seconds:.1f} s, {result.path}"


def fail(arguments: Sequence[str], error: StageError, started: float) -> int:
    """Print every fault of `error` as a line and, for programs, as the one object; return the exit code."""
    name = legible(next((each for each in arguments if not each.startswith("-")), ""))
    faults = [fault.given(_repeated(name, arguments)) if GIVEN in fault.fix else fault for fault in error.faults]
    messages.faults(faults)
    if "--json" in arguments:
        first = faults[0]
        where = f"{first.where}: {first.why}" if first.where and first.why else first.where or first.why
        result = Result(
            stage=name,
            status="failed",
            key=None,
            path=None,
            digest=None,
            counts={},
            seconds=round(time.monotonic() - started, 3),
            error=ResultError(code=first.code, what=first.what, where=where, fix=first.fix),
            findings=faults if name in ("validate", "verify") else msgspec.UNSET,
        )
        # Who takes no result has been told in words.
        with contextlib.suppress(StageError, BrokenPipeError):
            messages.result(msgspec.json.encode(result))
    return 128 + error.signal_number if isinstance(error, Stopped) else error.exit_code


def _repeated(name: str, arguments: Sequence[str]) -> str:
    """Return the settings and places of a command line whose command has failed."""
    group = click.Context(COMMAND)
    command = COMMAND.get_command(group, name)
    rest = list(arguments[list(arguments).index(name) + 1 :])
    return GIVEN if command is None else repeated(command.make_context(name, rest, resilient_parsing=True).params)


@contextlib.contextmanager
def _interruptible() -> Generator[None]:
    """Turn SIGINT or SIGTERM into an error that cleans up; what was published stays."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number, "stopped; finished work is kept", fix="run the same command again to go on")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say one line about a failure nobody foresaw; Python then exits with 1."""
    if "--debug" in sys.argv:
        traceback.print_exception(kind, error, trace)
    last = traceback.extract_tb(trace)[-1] if trace else None
    where = f"{Path(last.filename).name}:{last.lineno}" if last else ""
    bug = StageError("bug", f"{kind.__name__}: {error}", where=where, fix="run with --debug and report it")
    fail(sys.argv[1:], bug, time.monotonic())


def _usage(error: click.ClickException, arguments: Sequence[str]) -> BadConfig:
    """Return click's complaint as ours: the nearest option, or else where the help is."""
    near: list[str] = getattr(error, "possibilities", None) or []
    # click lists choices in lines of their own.
    what = " ".join((error.message if near else error.format_message()).rstrip(".").split())
    command = " ".join(["flux2-lora", *(each for each in arguments[:1] if each in STAGES or each in HELPERS)])
    return BadConfig("usage", what, fix=f"did you mean {near[0]}?" if near else f"{command} --help")


def _require_text(arguments: Sequence[str]) -> None:
    """Raise BadConfig for bytes that no TOML, key or JSON can hold."""
    for each in arguments:
        if legible(each) != each:
            fix = "type it as UTF-8; what it names must be renamed first"
            raise BadConfig("usage", "an argument is not UTF-8", where=legible(each), fix=fix)


def run(arguments: Sequence[str]) -> int:
    """Run one command line (none at all asks for help); return its exit code."""
    started = time.monotonic()
    try:
        _require_text(arguments)
        # Not `COMMAND.main`: it ends the process with 1 when the reader of its output leaves.
        with no_resources(Path()), COMMAND.make_context("flux2-lora", list(arguments) or ["--help"]) as context:
            return COMMAND.invoke(context) or 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return fail(arguments, _usage(error, arguments), started)
    except StageError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return fail(arguments, error, started)
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        silence(sys.stdout)
        return 128 + signal.SIGPIPE


def main() -> None:
    """Be the `flux2-lora` program."""
    steady()
    sys.excepthook = _bug
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Who lets everybody write has not thought of it: what anyone can change, nobody could believe.
    if (mask := os.umask(0o022)) & stat.S_IWOTH:
        os.umask(mask)
    sys.exit(run(sys.argv[1:]))


HELP = """Train a FLUX.2 LoRA from a folder of pictures and captions.

\b
Example:
  flux2-lora run photos --trigger sks --output sks.safetensors
"""
VERSION_OPTION = click.Option(
    ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
)
COMMAND = Commands(name="flux2-lora", help=HELP, params=[VERSION_OPTION], context_settings=CONTEXT)
