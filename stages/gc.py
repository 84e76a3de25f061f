"""gc: what no run uses any more, shown or deleted; small fragments put together into full ones.

In use is what a receipt of any run, or a pin, leads to. Only our own store is looked at, and in it only what this
program made and could make again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas import results
from schemas.errors import BadConfig
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import PATH, shared
from stages.contract.digests import read_proved, sha256_file
from stages.contract.formats import require_format
from stages.contract.locks import hold
from stages.contract.publish import make_folder, no_resources, refuse_link, sweep, write_file
from stages.contract.runner import store_lock
from stages.inspection.compaction import compact, scattered
from stages.inspection.lineage import MAKERS
from stages.inspection.reachability import PINS, Reach, Thing, reached, unreachable, withdraw

HELP = """Show what in a store no run uses any more; with --delete, delete it.

In use is everything that a receipt of a run leads to, so name every folder of results that shares the store (--runs,
repeatable). Not looked at: models, other people's stores (--also), anything this program did not make. Checkpoints
of a training that was begun stay, finished or not. While any stage works on the store nothing is deleted.

\b
Example:
  flux2-lora gc                                  # shows, deletes nothing
  flux2-lora gc --runs runs --runs old/runs --older-than 30 --delete
  flux2-lora gc --pin blue-cat                   # keep all that run uses, until store/pins/blue-cat is removed
"""


def pin(store: Path, runs: Sequence[Path], name: str) -> Path:
    """Keep what a run uses: copy its receipts into the store. Raises BadConfig when there is no such run."""
    names = [*(f"{stage}.json" for stage in MAKERS), results.TRAJECTORY]
    found = [place / name for place in runs if any((place / name / each).is_file() for each in names)]
    if not found or Path(name).name != name:
        known = sorted(folder.name for place in runs if place.is_dir() for folder in place.iterdir())
        why = f"there are {', '.join(known) or 'none'}"
        raise BadConfig("gc.unknown_run", f"there is no run {name}", why=why, fix="name one of them")
    target = store / PINS / name
    for folder in (target.parent, target):
        refuse_link(folder)
    for each in names:
        if (found[0] / each).is_file():
            receipt = found[0] / each
            with no_resources(receipt):
                data = read_proved(receipt, sha256_file(receipt))
            write_file(target / each, data)
    return target


def shown(things: Sequence[Thing]) -> list[tuple[str, str, str, str]]:
    """Return the rows of a table: kind, how many, how large, how old."""
    kinds: dict[str, list[Thing]] = defaultdict(list)
    for thing in things:
        kinds[thing.kind].append(thing)
    return [
        (
            kind,
            str(len(each)),
            f"{sum(thing.size_bytes for thing in each) / 1e6:.1f}",
            f"{min(thing.age_days for thing in each):.0f} .. {max(thing.age_days for thing in each):.0f}",
        )
        for kind, each in kinds.items()
    ]


def _refuse_nothing(reach: Reach, runs: Sequence[Path]) -> None:
    """Raise BadConfig where there is no run at all, or a folder of runs is not there: what they use would go."""
    absent = [each for each in runs if not each.is_dir()]
    if absent or not reach.runs:
        raise BadConfig(
            "gc.no_runs",
            "there is no such folder of results" if absent else "there is no run in these folders",
            where=", ".join(map(str, absent or runs)),
            why="what its runs use would go" if absent else "everything would go",
            fix="name the folders of results with --runs; or delete the store yourself",
        )


def collect(options: Mapping[str, Any]) -> tuple[Reach, list[Thing], dict[str, int]]:
    """Find what is not in use and, where asked to, delete it; return it with what was done."""
    store, runs, act = options["store"], options["runs"], options["delete"]
    reach = reached(store, runs)
    if act:
        _refuse_nothing(reach, runs)
    done = {"deleted": 0, "compacted": 0}
    if options["compact"]:
        small = [folder for folder, manifest in reach.artifacts.items() if scattered(store, folder, manifest)]
        done["compacted"] = len(small)
        for folder in small if act else ():
            compact(store, folder, reach.artifacts[folder])
        reach = reached(store, runs) if act and small else reach
    things = unreachable(store, reach, options["older_than"])
    if act and things:
        withdraw(store, [thing.path for thing in things])
        done["deleted"] = len(things)
    if act:
        # Of a process that died while it deleted: else that fills the disk until something is made.
        sweep(store)
    return reach, things, done


@shared("store", "json", "quiet", "debug")
@click.command("gc", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.option(
    "--runs", type=PATH, multiple=True, default=[Path("runs")], help="Folder of results; every one of them."
)
@click.option("--older-than", type=click.FloatRange(min=0), default=1.0, metavar="DAYS", help="Leave younger things.")
@click.option("--delete", is_flag=True, help="Delete what is shown.")
@click.option("--compact", is_flag=True, help="Put small fragments together; acts with --delete.")
@click.option("--pin", metavar="RUN", help="Keep what this run uses, even when its folder is gone.")
@click.option("--wait", is_flag=True, help="Wait for stages at work instead of failing.")
def COMMAND(**options: Any) -> int:
    """Be the `gc` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    store: Path = options["store"]
    if not store.is_dir():
        raise BadConfig("gc.no_store", "there is no such store", where=str(store), fix="name it with --store")
    require_format(store)
    if options["pin"]:
        messages.say(f"pinned: {pin(store, options['runs'], options['pin'])}")
    if options["delete"]:
        make_folder(store_lock(store).parent)
        with hold(store_lock(store), wait=options["wait"], waiting=messages.say):
            reach, things, done = collect(options)
    else:
        reach, things, done = collect(options)
    size = sum(thing.size_bytes for thing in things)
    if things:
        messages.table("Not in use", ("kind", "things", "MB", "days old"), shown(things))
    verb = "deleted" if options["delete"] else "could go (--delete)"
    messages.say(f"{len(things)} things, {size / 1e6:.1f} MB {verb}; {len(reach.runs)} runs use the rest")
    result = Result(
        stage="gc",
        status="built" if done["deleted"] or (options["delete"] and done["compacted"]) else "up to date",
        key=None,
        path=str(store.absolute()),
        digest=None,
        counts={"runs": len(reach.runs), "unreachable": len(things), "bytes": size, **done},
        seconds=round(time.monotonic() - started, 3),
        error=None,
        about={"unreachable": [msgspec.to_builtins(_told(store, thing)) for thing in things], "runs": reach.runs},
    )
    if options["json"]:
        messages.result(msgspec.json.encode(result))
    return 0


def _told(store: Path, thing: Thing) -> dict[str, Any]:
    name = thing.path.relative_to(store).as_posix()
    return {"kind": thing.kind, "path": name, "bytes": thing.size_bytes, "age_days": round(thing.age_days, 2)}
