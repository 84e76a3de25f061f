"""The plan of a run: each stage's work with what it needs, what this machine has, and what does not fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from schemas.base import Strict
from schemas.errors import Fault
from schemas.manifest import Result, ResultError
from stages.console import messages
from stages.contract.digests import is_unknown
from stages.contract.job import Job
from stages.contract.places import disk_of, free_bytes
from stages.flux2.backend import prepare
from stages.flux2.folder import BUILT_IN
from stages.flux2.identity import model_of
from stages.outlook.chain import Ahead, look_ahead
from stages.outlook.changes import PARTS, Why, why
from stages.outlook.needs import Need, Needs, surely_too_much, to_do
from stages.outlook.timing import Timing
from stages.training.memory import device_bytes
from stages.training.preflight import beyond_the_end

HEADER = ("stage", "state", "to do", "peak memory", "disk", "time")
UNITS = {
    "validate": "pictures",
    "encode-latents": "latents",
    "encode-text": "texts",
    "train": "steps",
    "preview": "pictures",
}
TOO_LITTLE = 7


class Row(Strict, frozen=True):
    """One stage of the plan. `counts` are those that it would report; `seconds` is None where none were measured."""

    stage: str
    why: Why
    to_do: int
    counts: Mapping[str, int]
    need: Need
    seconds: float | None


class Machine(Strict, frozen=True):
    """What this machine has: the device, the memory that a stage may fill, and what is free on the disks."""

    device: str
    memory_bytes: int | None
    store_free_bytes: int
    runs_free_bytes: int
    same_disk: bool


class Prospect(Strict, frozen=True):
    """The plan: stages in order, the machine, what does not fit, and what else is worth knowing."""

    model: str
    model_is_here: bool
    machine: Machine
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]


def prospect(job: Job, bench: Sequence[Path], aside: Path) -> Prospect:
    """Return the plan of `job`, one that only looks. Raises what planning a stage raises."""
    ahead, backend, model = look_ahead(job, aside), prepare(), model_of(job)
    machine = _machine(job, backend.device, device_bytes(backend))
    needs = Needs(job, ahead, backend, machine.memory_bytes)
    timing = Timing(job, ahead, needs.largest_px, bench)
    rows = tuple(
        Row(
            stage=stage,
            why=why(job, ahead, stage),
            to_do=to_do(stage, each),
            counts=each.counts,
            need=needs.of(stage),
            seconds=timing.seconds(stage),
        )
        for stage, each in ahead.items()
    )
    here = bool(model.transformer)
    return Prospect(
        model=model.variant.name,
        model_is_here=here,
        machine=machine,
        rows=rows,
        faults=(*_too_much(rows, machine), *_too_full(rows, machine)),
        notes=tuple(_notes(job, ahead, rows, machine.memory_bytes, here=here)),
    )


def _machine(job: Job, device: str, memory_bytes: int | None) -> Machine:
    return Machine(
        device=device,
        memory_bytes=memory_bytes,
        store_free_bytes=free_bytes(job.store),
        runs_free_bytes=free_bytes(job.runs),
        same_disk=disk_of(job.store) == disk_of(job.runs),
    )


def _too_much(rows: Sequence[Row], machine: Machine) -> Iterator[Fault]:
    """Yield a fault for every stage whose peak surely exceeds the memory."""
    for row in rows:
        if surely_too_much(row.need, machine.memory_bytes):
            yield Fault(
                code="memory.too_little",
                what=f"{row.stage} cannot fit into memory",
                why=_compared(row.need.peak_bytes or 0, machine.memory_bytes or 0),
                fix=_advice(row.need),
            )


def _too_full(rows: Sequence[Row], machine: Machine) -> Iterator[Fault]:
    """Yield a fault where the disk cannot hold what is to come."""
    store, run = (sum(getattr(row.need, name) for row in rows) for name in ("store_bytes", "run_bytes"))
    wanted = [("the store", store, machine.store_free_bytes), ("the runs", run, machine.runs_free_bytes)]
    if machine.same_disk:
        wanted = [("store and runs", store + run, machine.store_free_bytes)]
    for where, need, free in wanted:
        if need > free:
            fix = "free some space, raise train.checkpoint_every, or set train.rotation.keep_last"
            what = f"the disk of {where} is too full"
            yield Fault(code="disk.full", what=what, why=_compared(need, free), fix=fix)


def _notes(job: Job, ahead: Ahead, rows: Sequence[Row], limit_bytes: int | None, *, here: bool) -> Iterator[str]:
    source, inputs = job.config.model.source, [each.plan.inputs for each in ahead.values()]
    if here and any(is_unknown(each.get(part, "")) for each in inputs for part in PARTS):
        yield "files of the model have not been read here as they are now: what depends on them counts as to do"
    if not here and source not in BUILT_IN:
        yield f"the model is not on this machine; planned from its published shape. fix: flux2-lora fetch {source}"
    for row in rows:
        if row.need.fits is False and not surely_too_much(row.need, limit_bytes):
            compared = _compared(row.need.peak_bytes or 0, limit_bytes or 0)
            yield f"{row.stage} may not fit into memory: {compared}. fix: {_advice(row.need)}"
    if any(row.stage == "train" and row.to_do for row in rows):
        yield from beyond_the_end(job.config.train)
    if any(row.stage == "train" and row.seconds is None for row in rows):
        yield "nothing like this training was measured here: flux2-lora bench tells, saved with --json for --bench"
    if job.config.train.rotation is not None and rows[-1].to_do:
        yield "train.rotation deletes checkpoints: which of them stay, and so the pictures, is told at most"


def _advice(need: Need) -> str:
    if not need.remedy:
        return "take a smaller model, or a machine with more memory"
    return " ".join(f"--set {name}={value}" for name, value in need.remedy.items())


def _cells(row: Row) -> tuple[str, ...]:
    if not row.to_do and row.why.status == "up to date":
        return row.stage, "up to date", "", "", "", ""
    total = row.counts.get("total", row.counts.get("steps", row.counts.get("images", 0)))
    some = f"{row.to_do} of {total}" if row.to_do != total else str(total)
    need = row.need
    state = {"never made": "new", "gone": "missing"}.get(row.why.status, row.why.line())
    return (
        row.stage,
        state,
        f"{some} {UNITS[row.stage]}",
        "" if need.peak_bytes is None else _bytes(need.peak_bytes),
        _bytes(need.store_bytes + need.run_bytes),
        "" if not row.to_do else "unknown" if row.seconds is None else _duration(row.seconds),
    )


def show(found: Prospect) -> None:
    """Tell the plan to the person."""
    machine = found.machine
    rows = [_cells(row) for row in found.rows]
    rows.append(("verify", "always", "", "", "", ""))
    messages.table(f"Plan, {found.model} on {machine.device}", HEADER, rows)
    memory = "unknown" if machine.memory_bytes is None else _bytes(machine.memory_bytes)
    messages.say(f"memory {memory}, disk free {_bytes(machine.store_free_bytes)}")
    for note in found.notes:
        messages.say(note)
    messages.faults(found.faults)


def _compared(need: int, there: int) -> str:
    return f"about {_bytes(need)} are needed, there are {_bytes(there)}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tell(job: Job, bench: Sequence[Path], started: float) -> tuple[Result, int]:
    """Tell the person the plan of `job`, one that only looks; return it for programs, and the exit code."""
    with TemporaryDirectory() as aside:
        found = prospect(job, bench, Path(aside))
    show(found)
    first = next(iter(found.faults), None)
    waiting = sum(row.why.status != "up to date" for row in found.rows)
    result = Result(
        stage="plan",
        status="failed" if first else "built" if waiting else "up to date",
        key=None,
        path=None,
        digest=None,
        counts={"stages": len(found.rows), "to_do": waiting},
        seconds=round(time.monotonic() - started, 3),
        error=None
        if first is None
        else ResultError(code=first.code, what=first.what, where=first.why, fix=first.fix),
        about=msgspec.to_builtins(found),
    )
    return result, TOO_LITTLE if found.faults else 0
