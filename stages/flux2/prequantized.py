"""Weights that were quantized once and kept in a store, read in place of packing the source's at every start.

An artifact is keyed by the digest of the source's tensors and the format, so every run of that model shares it; keys
of later stages never see it: they hold the source's digest and the format. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from schemas.errors import Damaged
from schemas.quantize import Quantize
from stages.contract.artifacts import Plan, artifact_key, find, read_manifest
from stages.contract.job import Job
from stages.flux2.folder import ModelFiles
from stages.flux2.identity import text_encoder_digest, transformer_digest

Part = Literal["transformer", "text_encoder"]
PARTS: tuple[Part, ...] = ("transformer", "text_encoder")
# Raised when packing the same weights gives other numbers.
VERSION = 1
FILE = "model.safetensors"


def kind(part: Part) -> str:
    """Return the artifact's name in the store."""
    return f"quantized-{part.replace('_', '-')}"


def format_of(job: Job, part: Part) -> Quantize:
    """Return how the configuration wants a part held."""
    return job.config.model.quantize if part == "transformer" else job.config.encode_text.quantize


def plan_of(job: Job, model: ModelFiles, part: Part) -> Plan:
    """Return what keys the packed weights of a part: the source's tensors and the format."""
    digest = transformer_digest if part == "transformer" else text_encoder_digest
    return Plan({"quantize": format_of(job, part)}, {part: digest(job, model)})


def prequantized(job: Job, model: ModelFiles, part: Part) -> ModelFiles:
    """Return the model with a part's packed weights where a store has them, else as it is.

    Raises Damaged when their bytes changed since they were written.
    """
    if format_of(job, part) == "none":
        return model
    folder = find(kind(part), artifact_key(kind(part), VERSION, plan_of(job, model, part)), job.stores)
    if folder is None:
        return model
    path, expected = folder / FILE, read_manifest(folder).files[FILE].sha256
    if job.digests.files([path]) != [expected]:
        raise Damaged(
            "quantize.altered",
            "the quantized weights changed since they were written",
            where=str(path),
            why=f"expected sha256 {expected}",
            fix=f"{job.remedy('quantize')} --force",
        )
    return dataclasses.replace(model, **{part: (path,)})
