"""Which linears get an adapter: named sets, or patterns over the names of the blocks' linears.

Only linears inside the blocks can be chosen. The shared modulation drives every block at once and collapses when
trained; embedders and the final layer have names that some readers of LoRA files get wrong.
"""

from __future__ import annotations

import difflib
import fnmatch
from typing import Literal

from schemas.errors import BadConfig, Fault
from stages.flux2.variants import TransformerConfig

Targets = Literal["blocks", "attention"] | tuple[str, ...]
# Patterns of the named sets. linear1 and linear2 hold a single block's attention and MLP in one.
SETS: dict[str, tuple[str, ...]] = {
    "blocks": ("*",),
    "attention": ("double_blocks.*_attn.*", "single_blocks.*"),
}


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear inside the blocks, by BFL name, in the order of the forward pass."""
    width, hidden = config.inner_dim, config.mlp_dim
    stream = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.0": (2 * hidden, width),
        "mlp.2": (width, hidden),
    }
    double = {f"{name}_{part}": shape for name in ("img", "txt") for part, shape in stream.items()}
    single = {"linear1": (3 * width + 2 * hidden, width), "linear2": (width, width + hidden)}
    return {
        f"{kind}_blocks.{index}.{part}": shape
        for kind, count, parts in (
            ("double", config.num_layers, double),
            ("single", config.num_single_layers, single),
        )
        for index in range(count)
        for part, shape in parts.items()
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
