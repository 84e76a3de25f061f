"""Which linears get an adapter: named sets, or patterns over the names of the blocks' linears.

Only linears inside the blocks can be chosen. The shared modulation drives every block at once and collapses when
trained; embedders and the final layer have names that some readers of LoRA files get wrong.
"""

from __future__ import annotations

import difflib
import fnmatch
from typing import Literal

from schemas.errors import BadConfig, Fault
from stages.flux2.shapes import transformer_shapes
from stages.flux2.variants import TransformerConfig

Targets = Literal["blocks", "attention"] | tuple[str, ...]
BLOCKS = ("double_blocks.", "single_blocks.")
# Patterns of the named sets. linear1 and linear2 hold a single block's attention and MLP in one.
SETS: dict[str, tuple[str, ...]] = {
    "blocks": ("*",),
    "attention": ("double_blocks.*_attn.*", "single_blocks.*"),
}


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return (out, in) of every linear inside the blocks, by BFL name, in the order of the forward pass."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in transformer_shapes(config).items()
        if name.startswith(BLOCKS) and len(shape) == 2
    }


def resolve(config: TransformerConfig, targets: Targets) -> list[str]:
    """Return the names of the linears `targets` means, in the order of the forward pass.

    Patterns are shell-style (`double_blocks.*.img_attn.*`). Raises `BadConfig` for each that matches nothing.
    """
    names = list(linear_shapes(config))
    patterns = SETS[targets] if isinstance(targets, str) else targets
    matched = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    faults = [_matches_nothing(pattern, names) for pattern, found in matched.items() if not found]
    if not patterns:
        faults = [Fault(code="train.no_targets", what="train.targets is empty", fix='set train.targets = "blocks"')]
    if faults:
        raise BadConfig.of(faults)
    chosen = set().union(*matched.values())
    return [name for name in names if name in chosen]


def _matches_nothing(pattern: str, names: list[str]) -> Fault:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return Fault(
        code="train.no_such_target",
        what=f"the target {pattern} matches no linear of the blocks",
        where="train.targets",
        why=f"nearest: {', '.join(near)}; modulation, embedders and the final layer are never adapted",
        fix='correct the pattern, or set train.targets = "blocks"',
    )
