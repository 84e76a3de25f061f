"""What an adapter leaves out at one step, drawn from explicit keys inside the graph.

A key is a pure function of (seed, step, micro-batch, module), so a resumed run drops the same and another set of
adapted modules changes nothing for the rest; a checkpointed block draws from the same key again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from stages.contract.digests import digest_of


@dataclass(frozen=True)
class Rates:
    """Probabilities of dropping: a feature of the input, a rank of a sample, the whole adapter."""

    inputs: float = 0.0
    ranks: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        """Whether anything is ever dropped."""
        return max(self.inputs, self.ranks, self.module) > 0


@dataclass(frozen=True)
class Draw:
    """One adapter's draws of one step; without a key nothing is dropped and no operation is added."""

    rates: Rates = Rates()
    key: mx.array | None = None

    def inputs(self, x: mx.array) -> mx.array:
        """Drop single features of x [..., in]; the others grow so that the mean stays, as torch's dropout."""
        return self._dropped(x, self.rates.inputs, x.shape, 0)

    def ranks(self, low: mx.array) -> mx.array:
        """Drop ranks of low [B, ..., r], the same for all tokens of a sample; the others grow, as in kohya's."""
        return self._dropped(low, self.rates.ranks, (low.shape[0], *[1] * (low.ndim - 2), low.shape[-1]), 1)

    def module(self, adapted: mx.array, bare: mx.array) -> mx.array:
        """Return what the linear gives with its adapter or without, of the same shape; the rest never grows."""
        kept = self._kept(self.rates.module, (), 2)
        return adapted if kept is None else mx.where(kept, adapted, bare)

    def _dropped(self, x: mx.array, rate: float, shape: tuple[int, ...], purpose: int) -> mx.array:
        kept = self._kept(rate, shape, purpose)
        return x if kept is None else mx.where(kept, x / (1 - rate), 0)

    def _kept(self, rate: float, shape: tuple[int, ...], purpose: int) -> mx.array | None:
        if self.key is None or rate == 0:
            return None
        return mx.random.bernoulli(1 - rate, shape, mx.random.split(self.key, 3)[purpose])


KEEP_ALL = Draw()


def draw_key(seed: int, step: int, micro_batch: int, module: str) -> mx.array:
    """Return the key [2] uint32 of a module's draws in a micro-batch of a step."""
    return mx.random.key(int(digest_of("adapter-dropout", [seed, step, micro_batch, module])[:16], 16))
