"""ema: one LoRA that averages the checkpoints of a training, after the fact and with any width.

It only reads: the training, its artifacts and its run folder stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from schemas.errors import BadConfig, Stale
from schemas.manifest import Result
from stages.console import messages
from stages.console.invocation import PATH, job_of, places, shared
from stages.contract.artifacts import Plan, restore_file
from stages.contract.digests import canonical_json
from stages.contract.job import Job
from stages.contract.places import require_writable
from stages.contract.publish import workspace
from stages.contract.runner import load_stage, reading

if TYPE_CHECKING:
    from stages.stores.tensors import Tensor
    from stages.training.checkpoints import Checkpoint

# Just below 1 / sqrt(12), where the profile is flat.
WIDTH = click.FloatRange(0, 0.28, min_open=True)
SUFFIX = ".safetensors"
METADATA = "post_hoc_ema"

HELP = """Average the checkpoints of a training into one LoRA, with the power-function profile of Karras et al. 2024.

It reads the public checkpoints that train saved (more of them, with a smaller train.checkpoint_every, follow the
profile more closely) and writes one LoRA file.

\b
Example:
  flux2-lora ema --config pipelines/demo.toml --sigma-rel 0.1 --output smooth.safetensors
"""


def averaged_checkpoints(job: Job, plan: Plan) -> list[Checkpoint]:
    """Return the public checkpoints of a training so far, by step.

    Raises Stale when there are less than two, Damaged for one that cannot be read: it would be left out unsaid.
    """
    from stages.training.checkpoints import find_checkpoints, trajectory_of

    steps = job.config.train.steps
    saved, unreadable = find_checkpoints(job.stores, trajectory_of(plan.params, plan.inputs))
    for step, error in unreadable.items():
        if step <= steps:
            raise error
    found = [each for each in saved if each.manifest.public and each.step <= steps]
    if len(found) < 2:
        more = f" --force --set train.checkpoint_every={max(steps // 10, 1)}" if found else ""
        raise Stale(
            "ema.too_few",
            "averaging needs two checkpoints or more",
            where=job.run,
            why=f"found {len(found)} of at most {steps} steps",
            fix=f"{job.remedy('train')}{more}",
        )
    return found


def average(job: Job, plan: Plan, found: Sequence[Checkpoint], sigma_rel: float) -> dict[str, Tensor]:
    """Return the tensors of the LoRA file. Raises Damaged for a checkpoint whose bytes changed."""
    from stages.flux2.backend import prepare
    from stages.lora.init_lora import ROLE
    from stages.stores.tensors import to_mlx
    from stages.training.checkpoints import STATE
    from stages.training.ema import post_hoc
    from stages.training.sources import make_trainer

    settings, backend = job.config.train, prepare()
    messages.say(backend.line())
    # The trainer knows which factors of a state are to be saved, and what the base adds to them.
    trainer = make_trainer(job, settings, backend.compute_dtype, plan.inputs.get(ROLE))
    saved = []
    for checkpoint in found:
        state = {name: to_mlx(tensor) for name, tensor in checkpoint.state().items()}
        trainer.load_state(state, str(checkpoint.folder / STATE))
        saved.append((checkpoint.step, trainer.factors))
    return trainer.lora_file(post_hoc(saved, sigma_rel=sigma_rel))


def made_of(job: Job, found: Sequence[Checkpoint], sigma_rel: float) -> dict[str, str]:
    """Return the file's metadata: that of the last checkpoint's LoRA, and how the average was made."""
    from stages.lora.formats.bfl import metadata
    from stages.lora.targets import saved_rank
    from stages.stores.tensors import load

    last = found[-1]
    own = load(last.lora, sha256=last.manifest.files[last.lora.name].sha256).metadata
    how = {"sigma_rel": sigma_rel, "steps": [each.step for each in found]}
    return metadata(saved_rank(job.config.train), {**own, METADATA: canonical_json(how).decode()})


def write(job: Job, tensors: Mapping[str, Tensor], about: Mapping[str, str], target: Path) -> None:
    """Write the LoRA file, whole or not at all."""
    from stages.stores.tensors import described, save

    with workspace(job.store) as space:
        save(space / target.name, tensors, described(tensors, about))
        restore_file(space / target.name, target, job.digests)


@places
@shared("json", "quiet", "debug")
@click.command("ema", help=HELP, context_settings={"max_content_width": 118, "show_default": True})
@click.option("--sigma-rel", type=WIDTH, default=0.1, help="Width of the average as a share of the training.")
@click.option("--output", "-o", type=PATH, required=True, help="Where the LoRA goes, a .safetensors file.")
def COMMAND(**options: Any) -> int:
    """Be the `ema` command."""
    from stages.stores.tensors import tensor_digest

    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    job, output, sigma_rel = job_of(options), options["output"], options["sigma_rel"]
    if output.suffix != SUFFIX:
        raise BadConfig("ema.output", "no name for a LoRA file", where=str(output), fix=f"let it end in {SUFFIX}")
    require_writable(output.parent)
    with reading(job):
        plan = load_stage("train").plan(job)
        found = averaged_checkpoints(job, plan)
        about = made_of(job, found, sigma_rel)
        tensors = average(job, plan, found, sigma_rel)
        write(job, tensors, about, output)
    messages.say(f"averaged the checkpoints of steps {', '.join(str(each.step) for each in found)}: {output}")
    if options["json"]:
        result = Result(
            stage="ema",
            status="built",
            key=None,
            path=str(output.absolute()),
            digest=tensor_digest(tensors),
            counts={"checkpoints": len(found)},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
