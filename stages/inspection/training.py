"""What training left: the LoRA, its checkpoints, and a history in which every step happened once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from schemas import results
from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, NoResources, Stale
from schemas.manifest import Manifest
from schemas.train import Train
from stages.contract.job import Job
from stages.flux2.identity import model_without_making
from stages.inspection.findings import Chain, Inspection
from stages.training.checkpoints import (
    EMA,
    FOLDER,
    LORA,
    METRICS,
    REMEDY,
    STATE,
    Checkpoint,
    find_checkpoints,
    list_checkpoints,
    public_checkpoints,
    trajectory_of,
)
from stages.training.copies import copies_of_others
from stages.training.note import read_note
from stages.training.schedules import learning_rate

# As training itself allows: a third step in a row that is not finite ends it.
MOST_NOT_FINITE = 2
COPIES = {LORA: results.lora, EMA: results.ema}


def check_training(inspection: Inspection, chain: Chain) -> None:
    """Check the results of training, and the checkpoints that the run shows."""
    begun = _begun(inspection)
    finished = trajectory_of(chain["train"][0].params, chain["train"][0].inputs) if "train" in chain else ""
    if begun not in ("", finished):
        _unfinished(inspection, begun, finished)
    if "train" not in chain:
        return
    train, folder = chain["train"]
    _loras(inspection, train)
    _others(inspection, {begun, finished})
    if begun in ("", finished):
        for name, entry in train.files.items():
            if name not in COPIES:
                inspection.result(name, entry, "train")
        with inspection.noting():
            _checkpoints(inspection, chain)
    if not inspection.depth.quick and inspection.sound(folder / METRICS):
        _history(inspection, train, folder / METRICS, train.params["steps"])


def _begun(inspection: Inspection) -> str:
    """Return the trajectory that training in this run folder began last; "" when that is not known."""
    note = None
    with inspection.noting():
        note = read_note(inspection.job.run_folder)
    return "" if note is None else note.trajectory


def _unfinished(inspection: Inspection, begun: str, finished: str) -> None:
    """Tell of a training that was begun and not finished, and whether it can go on."""
    job = inspection.job
    if finished:
        what = "another training was begun after the one that is finished"
        inspection.error(Stale, "train.unfinished", what, f"trajectory {begun}", job.remedy("train"))
    with inspection.noting():
        found, unreadable = find_checkpoints(job.stores, begun)
        for error in unreadable.values():
            inspection.failed(error)
        for checkpoint in found:
            _files(inspection, checkpoint, REMEDY)


def _others(inspection: Inspection, own: set[str]) -> None:
    """Tell of copies that an older training left in the run folder: they look like this one's."""
    if others := copies_of_others(inspection.job, own):
        what = f"the run folder holds LoRAs of an older training: {others}"
        inspection.hint("train.copies_of_others", what, "delete them, or move them out of the run folder")


def _loras(inspection: Inspection, train: Manifest) -> None:
    """Check the finished LoRA and, where one was kept, its moving average."""
    job = inspection.job
    for name, named in COPIES.items():
        role = name.partition(".")[0]
        if role not in train.roles:
            continue
        path, entry = job.run_folder / named(job.run), train.files[name]
        inspection.file(path, entry, name, job.remedy("train"))
        if inspection.depth.quick:
            inspection.leave_out("the LoRA's numbers and names (left out by --quick)")
        elif path.is_file():
            with inspection.noting():
                _numbers(inspection, train, train.roles[role], path)


def _numbers(inspection: Inspection, train: Manifest, digest: str, path: Path) -> None:
    """Check a LoRA: a strict header, the tensors and the lineage it says, this model's linears, B not all zero."""
    from stages.lora.formats.read import read
    from stages.lora.layer import by_module, learnt
    from stages.lora.targets import saved_rank, sizes
    from stages.stores.tensors import TENSOR_DIGEST, load, tensor_digest, to_mlx

    fix = inspection.job.remedy("train")
    file = load(path)
    found = tensor_digest(file.tensors)
    if found != digest:
        inspection.error(Damaged, "lora.digest", "the tensors are not those that training made", path, fix)
    says = {
        TENSOR_DIGEST: found,
        "trajectory": trajectory_of(train.params, train.inputs),
        "base_model_digest": train.inputs["transformer"],
        "lora_rank": str(saved_rank(settings_of(train))),
    }
    if wrong := [name for name, value in says.items() if file.metadata.get(name, value) != value]:
        what = f"the LoRA's metadata say another {', '.join(wrong)}"
        inspection.error(Damaged, "lora.metadata", what, path, fix)
    try:
        config = model_without_making(inspection.job).variant.transformer
    except (BadConfig, NoResources) as error:
        inspection.leave_out(f"whether the LoRA fits the model ({error.faults[0].what})")
        return
    tensors = {name: to_mlx(each) for name, each in file.tensors.items()}
    factors = read(tensors, file.metadata, config, str(path))
    if (adapted := set(by_module(factors))) != (expected := set(sizes(config, settings_of(train)))):
        what = f"{len(expected - adapted)} linears lack their adapter, {len(adapted - expected)} have one unasked"
        inspection.error(Damaged, "lora.targets", what, path, fix)
    if not learnt(factors):
        what = "every up-matrix is zero: this LoRA does nothing"
        inspection.error(Damaged, "lora.zero", what, path, "train again with a higher train.learning_rate")


def settings_of(train: Manifest) -> Train:
    """Return the settings a training was made with; those in no key have their defaults."""
    known = {name: value for name, value in train.params.items() if name in Train.__struct_fields__}
    return msgspec.convert(known, Train)


def _checkpoints(inspection: Inspection, chain: Chain) -> None:
    """Check the checkpoints that the run shows, and that none is missing of those whose pictures it has."""
    job, train = inspection.job, chain["train"][0]
    fix = f"{job.remedy('train')} --force"
    trajectory = trajectory_of(train.params, train.inputs)
    public, unreadable = public_checkpoints(job.stores, train, job.config.train.checkpoint_every)
    for error in unreadable.values():
        inspection.failed(error)
    for checkpoint in public:
        _files(inspection, checkpoint, fix)
        entry = checkpoint.manifest.files[LORA]
        copy = job.run_folder / results.checkpoint(checkpoint.step)
        inspection.file(copy, entry, copy.name, job.remedy("train"))
        with inspection.noting():
            _complete(inspection, train, checkpoint)
        ends = (train.roles["lora"], train.roles.get("ema"))
        if checkpoint.step == train.params["steps"] and (checkpoint.manifest.lora, checkpoint.manifest.ema) != ends:
            what = "the finished LoRA is not that of the last checkpoint"
            inspection.error(Damaged, "lora.checkpoint", what, checkpoint.folder, fix)
    found = list_checkpoints(job.stores, trajectory)
    _moves(inspection, train, found)
    if "preview" in chain and shows(preview := chain["preview"][0], train):
        there = {each.step: {each.manifest.lora, each.manifest.ema} for each in found} | {0: {"none"}}
        for step, lora in drawn(preview).items():
            if step not in (train.params["steps"], *unreadable) and lora not in there.get(step, ()):
                what = f"the checkpoint of step {step} is missing"
                inspection.error(Damaged, "checkpoint.missing", what, trajectory, fix)


def _files(inspection: Inspection, checkpoint: Checkpoint, fix: str) -> None:
    """Check every file of a checkpoint."""
    name = f"{FOLDER}/{checkpoint.manifest.trajectory}/{checkpoint.step}"
    for file, entry in checkpoint.manifest.files.items():
        inspection.file(checkpoint.folder / file, entry, f"{name}/{file}", fix)


def _complete(inspection: Inspection, train: Manifest, checkpoint: Checkpoint) -> None:
    """Check that a training could go on from a checkpoint: every factor with its optimizer state, steps, history."""
    from stages.stores.tensors import open_tensors
    from stages.training.step import EMA as AVERAGE
    from stages.training.step import LORA as FACTORS
    from stages.training.step import OPTIMIZER, STEPS

    folder, averaged = checkpoint.folder, settings_of(train).ema is not None
    expected = {STATE, LORA, METRICS, *([EMA] if averaged else [])}
    fault: list[str] = []
    if set(checkpoint.manifest.files) != expected or (checkpoint.manifest.ema is not None) != averaged:
        fault.append(f"expected the files {', '.join(sorted(expected))}")
    if inspection.depth.quick or not inspection.sound(*(folder / name for name in expected)):
        pass
    elif STATE in checkpoint.manifest.files:
        with open_tensors(folder / STATE) as file:
            names = set(file.header.entries)
            steps = int(file.read(STEPS).data) if STEPS in names else -1
        factors = {name.removeprefix(FACTORS) for name in names if name.startswith(FACTORS)}
        averages = {name.removeprefix(AVERAGE) for name in names if name.startswith(AVERAGE)}
        moments = {name.removeprefix(OPTIMIZER).rpartition(".")[0] for name in names if name.startswith(OPTIMIZER)}
        if steps != checkpoint.step:
            fault.append(f"expected the state of step {checkpoint.step}, found {steps}")
        if not factors or factors - moments:
            fault.append(f"{len(factors - moments)} of {len(factors)} factors have no optimizer state")
        if averaged != bool(averages) or (averaged and not factors <= averages):
            fault.append("the moving average is not that of the factors")
        _history(inspection, train, folder / METRICS, checkpoint.step)
    if fault:
        what = f"a checkpoint is not complete: {'; '.join(fault)}"
        fix = f"{inspection.job.remedy('train')} --force"
        inspection.error(Damaged, "checkpoint.incomplete", what, folder, fix)


def _moves(inspection: Inspection, train: Manifest, found: list[Checkpoint]) -> None:
    """Check that no two checkpoints hold the same LoRA: steps between them at a rate above zero changed something."""
    settings = settings_of(train)
    for before, after in itertools.pairwise(found):
        rates = [
            learning_rate(settings.schedule, settings.peak_rate, step, settings.steps)
            for step in range(before.step, after.step)
        ]
        if before.manifest.lora == after.manifest.lora and any(rates):
            what = f"the LoRAs of steps {before.step} and {after.step} are the same: nothing was learnt between"
            fix = "train again with a higher train.learning_rate"
            inspection.error(Damaged, "checkpoint.same", what, after.folder, fix)


def _history(inspection: Inspection, train: Manifest, path: Path, steps: int) -> None:
    """Check metrics up to `steps`: each step once and in order, finite, at the rate of its schedule."""
    try:
        lines = [msgspec.json.decode(line, type=dict[str, float | None]) for line in path.read_bytes().splitlines()]
    except (OSError, *UNREADABLE):
        if inspection.sound(path):
            inspection.error(
                Damaged, "history.unreadable", "metrics are no JSON lines", path, _forced(inspection.job)
            )
        return
    inspection.checked += 1
    for code, what in history_faults(lines, settings_of(train), steps):
        inspection.error(Damaged, f"history.{code}", what, path, _forced(inspection.job))


def history_faults(lines: list[dict[str, float | None]], settings: Train, steps: int) -> Iterator[tuple[str, str]]:
    """Yield (code, what) for all that metrics of `steps` steps cannot be. A line of step 0 may come first."""
    taken = [line for line in lines if line.get("step")]
    found = [line["step"] for line in taken]
    if found != list(range(1, steps + 1)) or any(not line.get("step") for line in lines[1:]):
        yield "steps", f"expected steps 1 to {steps} once each and in order, found {len(found)} lines"
        return
    unfinished = 0
    for line in taken:
        step = int(line["step"] or 0)
        finite = all(_finite(line.get(name)) for name in ("loss", "grad_norm"))
        unfinished = 0 if finite else unfinished + 1
        if unfinished > MOST_NOT_FINITE:
            yield "not_finite", f"more than {MOST_NOT_FINITE} steps in a row are not finite, up to step {step}"
            return
        expected = learning_rate(settings.schedule, settings.peak_rate, step - 1, settings.steps)
        # A step that found no memory was left out, and says a rate of 0.
        if line.get("learning_rate") != expected and (finite or line.get("learning_rate") != 0.0):
            yield (
                "rate",
                f"step {step} has the learning rate {line.get('learning_rate')}, its schedule says {expected}",
            )
            return


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _forced(job: Job) -> str:
    return f"{job.remedy('train')} --force"


def drawn(preview: Manifest) -> dict[int, str]:
    """Return the LoRA of each step whose pictures there are."""
    named = {name.removeprefix("lora "): lora for name, lora in preview.inputs.items() if name.startswith("lora ")}
    return {int(step): lora for step, lora in named.items()}


def shows(preview: Manifest, train: Manifest) -> bool:
    """Whether the pictures are of what training made."""
    role = "ema" if preview.params.get("ema") else "lora"
    return drawn(preview).get(train.params["steps"]) == train.roles.get(role)
