"""What lies beside an artifact (`Manifest`), in a run folder (`Receipt`) and on stdout (`Result`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from schemas.base import Strict
from schemas.errors import Fault

CONTRACT_VERSION = 1

# The counts of the stages as people read them: how much there is, what was done, what was there, what was wrong.
COUNTED = (
    "images", "total", "steps", "accepted", "items", "checked", "encoded", "rendered", "reused", "resumed_from",
    "rejected", "errors", "warnings", "hints",
)  # fmt: skip


def in_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the counts, the most telling first: in a manifest they are in the order of their names."""
    return sorted(counts.items(), key=lambda each: COUNTED.index(each[0]) if each[0] in COUNTED else len(COUNTED))


# Of a receipt's key a path is made.
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class FileRecord(Strict, frozen=True):
    """Size in bytes and sha256 of one file."""

    size: Annotated[int, Meta(ge=0)]
    sha256: str


class Manifest(Strict, frozen=True):
    """Everything about one artifact: what it was made from (`key`), what it is (`digest`), its files and inputs.

    `roles` are the digests of what later stages read, each over only the rows and columns that a reader uses.
    `fragments` are files elsewhere in the store (paths below it). `self_digest` covers all other fields.
    """

    contract: int
    stage: str
    version: int
    key: str
    params: dict[str, Any]
    inputs: dict[str, str]
    roles: dict[str, str]
    files: dict[str, FileRecord]
    fragments: dict[str, FileRecord]
    counts: dict[str, int]
    provenance: dict[str, str]
    digest: str
    self_digest: str


class CheckpointManifest(Strict, frozen=True, omit_defaults=True):
    """One resumable point of a training: its files, and the tensor digests of the LoRA it stands for and its `ema`.

    `public` is false for a checkpoint forced by a signal: it exists to resume from, not to be looked at.
    `computed_on` are the devices of all steps up to this one; nothing where a checkpoint before did not say.
    """

    contract: int
    trajectory: str
    step: int
    public: bool
    lora: str
    files: dict[str, FileRecord]
    self_digest: str
    ema: str | None = None
    computed_on: tuple[str, ...] = ()


class Receipt(Strict, frozen=True):
    """Which artifact a run uses now for one stage."""

    stage: str
    key: Digest
    digest: str


class ResultError(Strict, frozen=True):
    """The first fault of a failure, as programs read it."""

    code: str
    what: str
    where: str
    fix: str


class Result(Strict, frozen=True, omit_defaults=True):
    """The one object `--json` prints; `findings` only where a stage lists them, `about` what else one has to say."""

    stage: str
    status: Literal["built", "up to date", "failed"]
    key: str | None
    path: str | None
    digest: str | None
    counts: dict[str, int]
    seconds: float
    error: ResultError | None
    findings: list[Fault] | msgspec.UnsetType = msgspec.UNSET
    about: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
