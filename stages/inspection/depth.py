"""How deep verify looks: which files it reads, which records it decodes, how many it makes again."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from schemas.errors import BadConfig
from stages.contract.digests import sha256_bytes
from stages.contract.job import Flags

PART = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")
Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Part:
    """Part `number` of `total`: every file is in exactly one of them, so that all parts together are everything."""

    number: int
    total: int

    def has(self, name: str) -> bool:
        """Whether the file of that name is in this part."""
        return int(sha256_bytes(name.encode())[:8], 16) % self.total == self.number - 1


@dataclass(frozen=True)
class Share:
    """A random share of the files, drawn anew by every run."""

    percent: float

    def has(self, _: str) -> bool:
        """Whether a file is drawn."""
        return random.random() * 100 < self.percent


@dataclass(frozen=True)
class Depth:
    """`quick` reads no contents; `subset` reads a part of the files, `deep` decodes every record besides.

    Of the records, and of the training steps, `recompute` percent are made again and compared.
    """

    quick: bool = False
    deep: bool = False
    subset: Part | Share | None = None
    recompute: float = 0.0

    @property
    def name(self) -> str:
        """What the report calls it."""
        match self.subset:
            case Part(number, total):
                base = f"subset {number}/{total}"
            case Share(percent):
                base = f"subset {percent:g}%"
            case None:
                base = "quick" if self.quick else "deep" if self.deep else "default"
        return f"{base}, recompute {self.recompute:g}%" if self.recompute else base

    def reads(self, name: str) -> bool:
        """Whether the contents of the file called `name` (a path below its store, or a file's name) are read."""
        return not self.quick and (self.subset is None or self.subset.has(name))

    def share(self, total: int) -> int:
        """Return how many of `total` are to be made again: `recompute` percent, rounded up."""
        return min(math.ceil(total * self.recompute / 100), total)

    def sample(self, records: Sequence[Chosen]) -> list[Chosen]:
        """Return the records to make again, drawn without repetition."""
        return random.SystemRandom().sample(records, self.share(len(records)))


def depth_of(flags: Flags) -> Depth:
    """Return the depth that the command line asks for. Raises BadConfig for contradictions."""
    asked = [name for name in ("quick", "deep", "subset") if getattr(flags, name)]
    if len(asked) > 1 or (flags.quick and flags.recompute):
        both = ", ".join(f"--{name}" for name in (*asked, *(["recompute"] if flags.recompute else [])))
        raise BadConfig("usage", f"these depths exclude each other: {both}", fix="flux2-lora verify --help")
    return Depth(
        quick=flags.quick,
        deep=flags.deep,
        subset=_subset(flags.subset) if flags.subset else None,
        recompute=_percent(flags.recompute, "--recompute") if flags.recompute else 0.0,
    )


def _subset(text: str) -> Part | Share:
    if (found := PART.fullmatch(text)) and int(found[1]) <= int(found[2]):
        return Part(int(found[1]), int(found[2]))
    if text.endswith("%"):
        return Share(_percent(text, "--subset"))
    raise BadConfig("usage", f"--subset {text} is neither part n/t nor a share p%", fix="say --subset 1/7, or 10%")


def _percent(text: str, option: str) -> float:
    found = PERCENT.fullmatch(text)
    if found is None or not 0 < float(found[1]) <= 100:
        raise BadConfig("usage", f"{option} {text} is no share", why="expected more than 0% to 100%", fix="say 5%")
    return float(found[1])
