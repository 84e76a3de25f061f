"""Where the tensors of a LoRA file belong: a linear of a block, whole or one third of its fused q, k, v."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """`module` is a BFL name; `third` is 0, 1, 2 for q, k, v rows of a fused linear, None for all of it."""

    module: str
    third: int | None = None

    def __str__(self) -> str:
        return self.module if self.third is None else f"{self.module} {'qkv'[self.third]}"


Spellings = dict[str, Place]
