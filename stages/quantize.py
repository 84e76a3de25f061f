"""quantize: a model's weights packed once and kept in the store, for all runs that hold them so.

Without it every start packs them again while it reads the full model, to the same numbers: this saves time and,
where a store is shared, room.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas.errors import BadConfig
from schemas.manifest import Manifest, Result
from stages.console import messages
from stages.console.invocation import job_of, places, shared
from stages.contract.artifacts import Built, Plan
from stages.contract.job import Job
from stages.contract.runner import run_stage
from stages.flux2 import prequantized
from stages.flux2.identity import model_of
from stages.flux2.prequantized import FILE, PARTS, Part, format_of

HELP = """Pack a model's weights once, as model.quantize and encode_text.quantize say, and keep them in the store.

It reads the model; train, preview and encode-text then read the packed weights, which are a quarter to half as large.
Results are the same with and without it. The file also serves as model.transformer or model.text_encoder elsewhere.

\b
Example:
  flux2-lora quantize --config pipelines/dev.toml --set model.quantize=4bit
"""


class Quantize:
    """Packs one part of the model; its role is the digest of the packed tensors."""

    version = prequantized.VERSION

    def __init__(self, part: Part) -> None:
        self.part: Part = part
        self.name = prequantized.kind(part)

    def plan(self, job: Job) -> Plan:
        """Key the source's tensors and the format."""
        return prequantized.plan_of(job, model_of(job), self.part)

    def build(self, job: Job, plan: Plan, work: Path) -> Built:
        """Write one file of canonical names; what stays dense keeps its own type."""
        from stages.flux2 import load
        from stages.flux2.backend import prepare
        from stages.stores.tensors import from_mlx, save, tensor_digest

        backend = prepare()
        job.say(backend.line())
        packed = load.packed_transformer if self.part == "transformer" else load.packed_text_encoder
        tensors = {name: from_mlx(array) for name, array in packed(model_of(job), plan.params["quantize"])}
        save(work / FILE, tensors, {"format": "mlx", "quantize": plan.params["quantize"], **plan.inputs})
        return Built({self.part: tensor_digest(tensors)}, {"tensors": len(tensors)}, device=backend.name)

    def reused(self, manifest: Manifest) -> Mapping[str, int]:
        """They are there."""
        return manifest.counts

    def restore(self, job: Job, folder: Path, manifest: Manifest) -> None:
        """Leave nothing in the run folder."""


@places
@shared("force", "json", "quiet", "debug")
@click.command("quantize", help=HELP, context_settings={"max_content_width": 118})
def COMMAND(**options: Any) -> int:
    """Be the `quantize` command."""
    started = time.monotonic()
    messages.configure(quiet=options["quiet"])
    job = job_of(options)
    parts: list[Part] = [part for part in PARTS if format_of(job, part) != "none"]
    if not parts:
        raise BadConfig(
            "quantize.nothing",
            "the configuration holds all weights as they are",
            where=str(job.config_path),
            fix='set model.quantize = "8bit" or encode_text.quantize = "8bit"',
        )
    outcomes = [run_stage(Quantize(part), job) for part in parts]
    for part, outcome in zip(parts, outcomes, strict=True):
        done = "quantized" if outcome.built else "up to date"
        messages.say(f"{part} {format_of(job, part)}: {done}, {outcome.folder / FILE}")
    built = sum(outcome.built for outcome in outcomes)
    if options["json"]:
        result = Result(
            stage="quantize",
            status="built" if built else "up to date",
            key=None,
            path=str(job.store.absolute()),
            digest=None,
            counts={"quantized": built, "reused": len(outcomes) - built},
            seconds=round(time.monotonic() - started, 3),
            error=None,
        )
        messages.result(msgspec.json.encode(result))
    return 0
