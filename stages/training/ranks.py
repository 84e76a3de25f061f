"""Data-parallel training: processes that MLX launched together share the micro-batches of every step.

The first process (rank 0) is the training a person sees: it plans, resumes, saves, draws and speaks. The others only
compute, and write nothing. How many there are is no setting, as the number of threads is none: the gradients are the
same up to the order of their additions.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from schemas.errors import BadConfig, NoResources, Stale
from schemas.train import Train
from stages.contract.launch import VARIABLES, launched_rank

NOTHING = bytes(32)
BACKEND_ERROR = re.compile(r"\[(ring|mpi|nccl|jaccl)\]")
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, as one of them sees them; alone, it is the first of one."""

    rank: int = 0
    size: int = 1

    @property
    def follows(self) -> bool:
        """Whether another process is the training that people see."""
        return self.rank > 0

    def named(self, device: str) -> str:
        """Return what computes: `device`, or as many of them as there are processes."""
        return device if self.size == 1 else f"{self.size} processes, first on {device}"

    def check(self, settings: Train) -> None:
        """Raise BadConfig unless the micro-batches of a step can be shared out evenly."""
        if settings.gradient_accumulation % self.size:
            raise BadConfig(
                "train.processes",
                f"{self.size} processes cannot share the micro-batches of a step evenly",
                why=f"train.gradient_accumulation is {settings.gradient_accumulation}",
                fix=f"make train.gradient_accumulation a multiple of {self.size}, or launch fewer processes",
            )

    def place(self, index: int) -> int:
        """Return which micro-batch of the step is this process's micro-batch `index`."""
        return self.rank + index * self.size

    def own(self, micro_batches: int) -> list[int]:
        """Return the places of this process's micro-batches among those of a step."""
        return [self.place(index) for index in range(micro_batches // self.size)]

    def total(self, arrays: Mapping[str, mx.array], share: float) -> dict[str, mx.array]:
        """Return the sum over the processes of share * array, float32; the arrays themselves when alone."""
        if self.size == 1:
            return dict(arrays)
        # As one message: each costs a round trip.
        flat = mx.concatenate([array.reshape(-1) for array in arrays.values()])
        ends = np.cumsum([array.size for array in arrays.values()]).tolist()
        parts = mx.split(mx.distributed.all_sum(flat * share), ends[:-1])
        return {name: part.reshape(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}

    def begin(self, trajectory: str) -> None:
        """Tell the processes that follow to train `trajectory`; their Stale ends this one too, with the launcher."""
        self._told(bytes.fromhex(trajectory))

    def end(self) -> None:
        """Tell the processes that follow that nothing is left to train."""
        self._told(NOTHING)

    def listen(self, trajectory: str) -> bool:
        """Wait for the first process; return whether it begins to train, False when nothing is left.

        Raises Stale when what it trains is not `trajectory`, which is what this process would.
        """
        told = self._told(NOTHING)
        if told not in (NOTHING, bytes.fromhex(trajectory)):
            raise Stale(
                "train.other_trajectory",
                f"process {self.rank} would train something else than the first one",
                why="their settings, dataset, caches or models differ",
                fix="give all processes the same configuration, store and model",
            )
        return told != NOTHING

    def from_first(self, state: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the first process's `state` in every process, bit for bit."""
        return {name: self._from_first(array) for name, array in state.items()}

    @contextmanager
    def together(self) -> Generator[None]:
        """Raise NoResources when another process is lost meanwhile: what was under way cannot be finished."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not BACKEND_ERROR.match(str(error)):
                raise
            raise NoResources(
                "train.process_lost",
                "another process of this training is gone",
                why=str(error),
                fix="look at what it said, then launch the same command again: it goes on from the last checkpoint",
            ) from error

    def _told(self, word: bytes) -> bytes:
        """Return the word of the first process; the others say nothing."""
        if self.size == 1:
            return word
        return bytes(np.array(mx.distributed.all_sum(mx.array(list(word), dtype=mx.int32))).tolist())

    def _from_first(self, array: mx.array) -> mx.array:
        if self.size == 1:
            return array
        # As bits: adding zeros would lose the sign of a zero.
        bits = array.reshape(-1).view(UNSIGNED[array.dtype.size])
        sent = mx.distributed.all_sum(mx.zeros_like(bits) if self.follows else bits)
        # One after the other: in a graph of several, each process might begin with another one.
        mx.eval(sent)
        return sent.view(array.dtype).reshape(array.shape)


def ranks() -> Ranks:
    """Return this process's place among those launched with it; waits until all of them are there.

    Raises NoResources where nothing says how to reach them: schedulers set the same variables for a process alone.
    """
    if launched_rank() is None:
        return Ranks()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise NoResources(
            "train.no_processes",
            "the environment says that this process is one of several, and not how to reach the others",
            why=str(error),
            fix=f"launch them with mlx.launch, or unset {' and '.join(VARIABLES)} to train alone",
        ) from error
    return Ranks(group.rank(), group.size())
