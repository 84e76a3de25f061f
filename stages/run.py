"""run: pictures in, LoRA out. Writes the pipeline TOML it stands for and runs its six stages, a process each.

Text encoder, autoencoder and transformer are so never in memory together. An interrupted run goes on when the same
command is given again: each stage finds what is done.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas import results
from schemas.errors import BadConfig, Fault, NoResources
from schemas.events import VARIABLE
from schemas.manifest import Result
from schemas.run import Config
from schemas.train import Train
from stages.console import messages
from stages.console.invocation import PATH, shared
from stages.console.progress import ChainDisplay, Status
from stages.contract.artifacts import restore_file
from stages.contract.config import is_folder, load_config, run_name
from stages.contract.digests import StatCache, sha256_bytes
from stages.contract.job import Job, require_apart
from stages.contract.places import require_writable
from stages.contract.publish import no_resources, refuse_link, write_file
from stages.contract.runner import STAGES
from stages.flux2.variants import VARIANTS
from stages.training.interruption import heard

PIPELINE = "pipeline.toml"
SUFFIX = ".safetensors"
# The option that gives each setting which it could give a wrong value.
OPTIONS = {
    "run.seed": "--seed",
    "validate.trigger": "--trigger",
    "validate.resolutions": "--resolution",
    "train.steps": "--max-steps",
    "train.checkpoint_every": "--save-every-n-steps",
    "train.rank": "--rank",
    "train.alpha": "--rank",
    "train.learning_rate": "--learning-rate",
    "train.batch_size": "--batch-size",
    "preview.prompts": "--validation-prompt",
    "preview.seed": "--validation-seed",
    "preview.size": "--validation-size",
}
SETTING = re.compile(rf"(?<![\[.\w])({'|'.join(map(re.escape, OPTIONS))})(?!\.?\w)( = )?")
# Exit codes above this are of processes that a signal stopped.
SIGNALLED = 128
# What the system does where memory runs out: it kills, or an allocation that nobody checked ends in nothing.
KILLED = tuple(SIGNALLED + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT))
HEADER = """# Written by `flux2-lora run`; {digest}
# It stands for that command: copy it to change more settings, and run the stages with --config.

"""
HEADER_PATTERN = re.compile(r"\A# Written by `flux2-lora run`; ([0-9a-f]{64})\n")


def pipeline(options: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return the tables of the TOML that the command line stands for; `folder` is where it will lie."""
    variant = VARIANTS.get(options["model"])
    train = {"steps": options["max_steps"], "checkpoint_every": options["save_every_n_steps"]}
    optional = {
        "rank": options["rank"],
        "learning_rate": options["learning_rate"],
        "batch_size": options["batch_size"],
    }
    train |= {field: value for field, value in optional.items() if value is not None}
    if options["rank"] is not None:
        train["alpha"] = float(options["rank"])
    dataset = os.path.relpath(options["pictures"].absolute(), folder.absolute())
    validate = {"dataset": dataset, "trigger": options["trigger"], "resolutions": list(options["resolution"])}
    return {
        "run": {"name": name, "seed": options["seed"]},
        "model": {"source": (variant.hub_id or variant.name) if variant else _source(options["model"], folder)},
        "validate": validate,
        "train": train,
        "preview": {
            "prompts": list(options["validation_prompt"]),
            "seed": options["validation_seed"],
            "size": options["validation_size"],
        },
    }


def _source(model: str, folder: Path) -> str:
    """Return a model folder as the TOML names it; anything else is a hub id."""
    return os.path.relpath(Path(model).absolute(), folder.absolute()) if is_folder(Path(model)) else model


def require_output(output: Path) -> None:
    """Raise BadConfig or NoResources, before hours of training, for what no LoRA can be written to."""
    if output.suffix != SUFFIX or output.is_dir():
        raise BadConfig("run.output", "no name for a LoRA file", where=str(output), fix=f"let it end in {SUFFIX}")
    refuse_link(output)
    with no_resources(output):
        require_writable(output.parent)


def settled(tables: dict[str, Any]) -> Config:
    """Return the tables as a configuration. Raises BadConfig in the words of the command line."""
    import tomli_w

    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(tomli_w.dumps(tables).encode())
        file.flush()
        try:
            return load_config(Path(file.name))
        except BadConfig as error:
            raise BadConfig.of(map(_of_option, error.faults)) from error


def _of_option(fault: Fault) -> Fault:
    """Return a setting's fault as that of the option it was given by."""
    option = next((option for name, option in OPTIONS.items() if fault.what.startswith(name)), None)
    return fault if option is None else msgspec.structs.replace(fault, where=option, fix=f"correct {option}")


def in_options(text: str) -> str:
    """Return what a stage says with the options of `run` in place of the settings that they give."""
    return SETTING.sub(lambda found: OPTIONS[found[1]] + (" " if found[2] else ""), text)


def write_pipeline(path: Path, tables: dict[str, Any]) -> None:
    """Write the TOML. Raises BadConfig when someone edited the one that is there."""
    import tomli_w

    body = tomli_w.dumps(tables)
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = HEADER_PATTERN.match(text)
        if found is None or found[1] != sha256_bytes(text.partition("\n\n")[2].encode()):
            raise BadConfig(
                "run.edited",
                "the pipeline file was edited since `run` wrote it",
                where=str(path),
                fix=f"run its stages with --config {path}, or delete it",
            )
    write_file(path, (HEADER.format(digest=sha256_bytes(body.encode())) + body).encode())


def plan_only(options: dict[str, Any], name: str) -> tuple[Result, int]:
    """Tell what the pipeline would do, without leaving it anywhere; return that for programs, and the exit code."""
    from stages.outlook.prospect import tell

    started = time.monotonic()
    # As if it lay here: its own folder need not be there yet.
    config = settled(pipeline(options, name, Path()))
    job = Job(config, Path(PIPELINE), options["store"], options["runs"], look_only=True, warn=messages.warn)
    return tell(job, (), started)


def run_chain(config: Path, places: Sequence[str], *, quiet: bool) -> tuple[int, list[Result]]:
    """Run the six stages in order under one display; return the first failure's exit code and all results.

    Raises NoResources when the system ends a stage.
    """
    told: list[Result] = []
    with ChainDisplay(STAGES, quiet=quiet).shown() as display:
        for stage in STAGES:
            command = [sys.executable, "-m", "stages", stage, "--config", str(config), "--json", *places]
            code, printed = _run_process(command, lambda line: display.feed(in_options(line)))
            with contextlib.suppress(msgspec.DecodeError):
                told.append(msgspec.json.decode(printed, type=Result))
            display.finish(stage, _status(code, told[-1] if told else None))
            if code in KILLED:
                raise _died(stage, code - SIGNALLED)
            if code:
                return code, told
    return 0, told


def _died(stage: str, number: int) -> NoResources:
    """Return the error of a stage that could not say why it ended."""
    return NoResources(
        "stage.died",
        f"the system ended {stage}",
        why=f"by {signal.Signals(number).name}, as it does when there is no memory left",
        fix="close other programs, or ask for less: --batch-size, --resolution, --rank, or model.quantize in a "
        "pipeline of your own; the same command goes on from what is saved",
    )


def _status(code: int, result: Result | None) -> Status:
    if code > SIGNALLED and code not in KILLED:
        return "stopped"
    return "failed" if code or result is None else result.status


def _run_process(command: Sequence[str], hear: Callable[[str], None]) -> tuple[int, bytes]:
    """Run a stage, handing on its lines and any signal; return its exit code and what it printed."""
    environment = {**os.environ, VARIABLE: "1"}
    # A session of its own: Ctrl-C reaches the stage once, from here, and a second one means "at once" to it.
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.PIPE, env=environment, text=True, start_new_session=True
        ) as process,
        forwarded(process),
    ):
        for line in process.stderr or ():
            hear(line)
        code = process.wait()
        output.seek(0)
        return (code if code >= 0 else 128 - code), output.read()


@contextlib.contextmanager
def forwarded(process: subprocess.Popen[Any]) -> Generator[None]:
    """Let the stage handle the signals that this process gets; a closed terminal stops it like SIGTERM."""
    sent = heard()
    before = {number: signal.signal(number, lambda got, _: process.send_signal(sent[got])) for number in sent}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(told: Sequence[Result], code: int, output: Path, steps: int, started: float) -> Result:
    """Return the run's one object: that of the stage which failed, or of the whole.

    It is up to date when all stages are that make something: verify always looks.
    """
    idle = all(each.status == "up to date" for each in told[:-1])
    error = told[-1].error if code and told else None
    if error is not None:
        error = msgspec.structs.replace(error, where=in_options(error.where), fix=in_options(error.fix))
    return Result(
        stage="run",
        status="failed" if code else "up to date" if idle else "built",
        key=None,
        path=None if code else str(output.absolute()),
        digest=None,
        counts={} if code else {"stages": len(STAGES), "steps": steps},
        seconds=round(time.monotonic() - started, 3),
        error=error,
    )


HELP = """Pictures in, LoRA out: write the pipeline and run its six stages.

Give the same command again to go on after an interruption; what is done is not done twice.

\b
Example:
  flux2-lora run photos --model klein-base-4b --trigger sks --output sks.safetensors \\
      --max-steps 1500 --validation-prompt "sks on a couch"
"""
DEFAULTS = Train()
MODELS = f"One of {', '.join(VARIANTS)}; or a folder; or a hub id."


@shared("store", "runs", "json", "debug")
@click.command("run", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.argument("pictures", type=PATH)
@click.option("--model", default="klein-base-4b", help=MODELS)
@click.option("--trigger", default="", help="The made-up word for what is learnt.")
@click.option("--output", "-o", type=PATH, default=Path("lora.safetensors"), help="Where the LoRA goes.")
@click.option("--max-steps", type=int, default=DEFAULTS.steps, help="Training steps.")
@click.option("--save-every-n-steps", type=int, default=DEFAULTS.checkpoint_every, help="Checkpoint interval.")
@click.option("--resolution", type=int, multiple=True, default=[512], help="Side of the buckets' area.")
@click.option("--rank", type=int, help="Rank of the LoRA, and its alpha.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--batch-size", type=int, help="Pictures per step.")
@click.option("--seed", type=int, default=42, help="Seed of everything in training.")
@click.option("--validation-prompt", multiple=True, help="A prompt to draw at every checkpoint.")
@click.option("--validation-seed", type=int, default=42, help="Seed of the previews.")
@click.option("--validation-size", type=int, default=512, help="Side of the previews in pixels.")
@click.option("--plan", is_flag=True, help="Say what it would do and take, then stop.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings and errors only.")
def COMMAND(**options: Any) -> int:
    """Be the `run` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    output: Path = options["output"]
    name = run_name(output)
    runs, store = options["runs"], options["store"]
    if not options["pictures"].is_dir():
        where = str(options["pictures"])
        raise BadConfig(
            "dataset.absent", "no such folder of pictures", where=where, fix="name the folder of pictures"
        )
    require_apart(options["pictures"], store, runs)
    require_output(output)
    if options["plan"]:
        planned, code = plan_only(options, name)
        if options["json"]:
            messages.result(msgspec.json.encode(planned))
        return code
    config_path, tables = runs / name / PIPELINE, pipeline(options, name, runs / name)
    config = settled(tables)
    write_pipeline(config_path, tables)
    messages.say(f"{config_path} says everything this run does")
    places = ["--store", str(store), "--runs", str(runs), *(["--quiet"] if options["quiet"] else [])]
    code, told = run_chain(config_path, places, quiet=options["quiet"])
    if code == 0:
        restore_file(runs / name / results.lora(name), output, StatCache(store / "lookup" / "digests.sqlite"))
        messages.say(f"the LoRA: {output}")
        messages.say(f"everything else: {runs / name}")
    if options["json"]:
        messages.result(msgspec.json.encode(_outcome(told, code, output, config.train.steps, started)))
    return code
