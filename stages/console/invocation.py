"""From a command line to a job: the options that every command about one run has, and what they mean."""

from __future__ import annotations

import difflib
import errno
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import click

from schemas.errors import GIVEN, BadConfig, legible
from stages.console import messages
from stages.contract.config import load_config
from stages.contract.job import Flags, Job
from stages.contract.trust import distrusted, require_trust

STORE, RUNS = Path("store"), Path("runs")


class Place(click.Path):
    """A path that the file system can hold, and that keys, tables and JSON can name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises BadConfig for one that is empty, too long or not UTF-8 from its root on."""
        path = cast("Path", super().convert(value, param, ctx))
        why = _unusable(path) if str(value) else "it is empty"
        if not why:
            return path
        option = param.opts[0] if param else ""
        raise BadConfig("usage.path", "no usable path", where=option, why=why, fix="name another, or rename it")


def _unusable(path: Path) -> str:
    """Return why nothing can lie at `path`, or nobody could say where; nothing when all is well."""
    try:
        whole = str(path.absolute())
    except FileNotFoundError:
        return "the folder it starts from is gone"
    if legible(whole) != whole:
        return f"{legible(whole)} is not UTF-8"
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"{error.strerror}: {whole[:80]}..."
    return ""


PATH = Place(path_type=Path)

# What several commands have is spelled, explained and defaulted here, for all of them.
SHARED: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "config": (("--config", "-c"), {"required": True, "type": PATH, "help": "The pipeline's TOML file."}),
    "set": (("--set", "assignments"), {"multiple": True, "metavar": "A.B=C", "help": "Override one setting."}),
    "store": (
        ("--store",),
        {
            "type": PATH,
            "envvar": "FLUX2_LORA_STORE",
            "default": STORE,
            "show_default": True,
            "help": "Folder of artifacts, shared by all runs.",
        },
    ),
    "also": (("--also",), {"type": PATH, "multiple": True, "help": "Another store to read from."}),
    "trust": (
        ("--trust",),
        {"type": PATH, "metavar": "FILE", "help": "Whose signatures count in other people's stores."},
    ),
    "runs": (("--runs",), {"type": PATH, "default": RUNS, "show_default": True, "help": "Folder of results."}),
    "force": (("--force",), {"is_flag": True, "help": "Do the work again even if it is done."}),
    "json": (("--json",), {"is_flag": True, "help": "Print one JSON object on stdout."}),
    "quiet": (("--quiet",), {"is_flag": True, "help": "Print warnings and errors only."}),
    "debug": (("--debug",), {"is_flag": True, "expose_value": False, "help": "Show tracebacks."}),
}


def option(name: str, **other: Any) -> click.Option:
    """Return the option that several commands have under that name; `other` is what one of them has otherwise."""
    spellings, about = SHARED[name]
    return click.Option(spellings, **{**about, **other})


def shared(*names: str) -> Callable[[click.Command], click.Command]:
    """Put options that other commands have as well behind a command's own."""

    def having(command: click.Command) -> click.Command:
        command.params = [*command.params, *map(option, names)]
        return command

    return having


def place_options(*, config_required: bool = True) -> list[click.Option]:
    """Return the options that say what to run and where things lie."""
    return [option("config", required=config_required), *map(option, ("set", "store", "also", "trust", "runs"))]


def places(command: click.Command) -> click.Command:
    """Put the options of `place_options` before a command's own."""
    command.params = [*place_options(), *command.params]
    return command


def job_of(options: dict[str, Any]) -> Job:
    """Return the job of a command's options. Raises BadConfig as `load_config` does, Untrusted for others' stores."""
    also, allowed = options["also"], options["trust"]
    require_trust(also, allowed)
    return Job(
        config=load_config(options["config"], options["assignments"]),
        config_path=options["config"],
        store=options["store"],
        runs=options["runs"],
        also=tuple(store for store in also if not distrusted(store)),
        foreign=tuple(store for store in also if distrusted(store)),
        allowed=allowed,
        given=_given(options),
        look_only=options.get("look_only", False),
        flags=Flags(**{name: options[name] for name in Flags.__dataclass_fields__ if name in options}),
        say=messages.say,
        warn=messages.warn,
    )


def repeated(options: Mapping[str, Any]) -> str:
    """Return what a command was told of settings and places, for a shell; GIVEN where it has no --config."""
    if options.get("config") is None:
        return GIVEN
    return shlex.join(["--config", str(options["config"]), *_given(options)])


def _given(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of `place_options` beside --config as they were given; not every command has all."""
    several = (("--set", "assignments"), ("--also", "also"))
    one = (("--store", "store", STORE), ("--trust", "trust", None), ("--runs", "runs", RUNS))
    words = [(spelling, str(value)) for spelling, name in several for value in options.get(name, ())]
    words += [
        (spelling, str(options[name])) for spelling, name, default in one if options.get(name, default) != default
    ]
    return tuple(part for word in words for part in word)


def run_folder(runs: Path, run: str) -> Path:
    """Return the folder of a run that has begun. Raises BadConfig, naming those there are."""
    names = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    if run in names:
        return runs / run
    near = difflib.get_close_matches(run, names, n=1)
    raise BadConfig(
        "run.unknown",
        f"there is no run {run}",
        where=str(runs),
        why=f"there are {', '.join(names) or 'none'}",
        fix=f"did you mean {near[0]}?" if near else "name one of them, or the folder of results with --runs",
    )
