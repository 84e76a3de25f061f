"""Which linears get an adapter, and how large: named sets, or patterns over the linears' names.

A pattern is shell-style (`double_blocks.*.img_attn.*`), or behind "re:" a Python regular expression; either has to
match the whole name.

Adaptable are all linears inside the blocks, and img_in, txt_in and final_layer.linear, which ComfyUI and diffusers
read too (mflux and the Swift app skip those three). Not adaptable: the shared modulation and the embedders of time
and guidance, each of which drives every block at once and collapses when trained, and final_layer.adaLN_modulation,
whose halves diffusers swaps.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from schemas.adapter import Adapter, DoRA, LoKr, LoRA
from schemas.errors import BadConfig, Fault
from schemas.train import Train
from stages.flux2.shapes import transformer_shapes
from stages.flux2.variants import TransformerConfig

SetName = Literal["blocks", "attention", "all"]
Targets = SetName | tuple[str, ...]
BLOCKS = ("double_blocks.", "single_blocks.")
EXPRESSION = "re:"
NAMED = 3  # of many, in messages
FIRST, LAST = ("img_in", "txt_in"), ("final_layer.linear",)
# Patterns of the named sets. linear1 and linear2 hold a single block's attention and MLP in one.
SETS: dict[SetName, tuple[str, ...]] = {
    "blocks": ("double_blocks.*", "single_blocks.*"),
    "attention": ("double_blocks.*_attn.*", "single_blocks.*"),
    "all": ("*",),
}


class Size(NamedTuple):
    """How large a linear's adapter is."""

    rank: int
    alpha: float


def linear_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return (out, in) of every adaptable linear, by BFL name, in the order of the forward pass."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in transformer_shapes(config).items()}
    blocks = [name for name, shape in shapes.items() if name.startswith(BLOCKS) and len(shape) == 2]
    return {name: shapes[name] for name in (*FIRST, *blocks, *LAST)}


def resolve(config: TransformerConfig, targets: Targets, exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of the linears `targets` means without those of `exclude`, in the order of the forward pass.

    Raises `BadConfig` for every pattern that matches nothing or is no regular expression.
    """
    names = list(linear_shapes(config))
    patterns = SETS[targets] if isinstance(targets, str) else targets
    faults = list(_faults(patterns, names, "train.targets"))
    if not patterns:
        faults = [Fault(code="train.no_targets", what="train.targets is empty", fix='set train.targets = "blocks"')]
    chosen = names if faults else _matched(names, patterns)
    faults += _faults(exclude, chosen, "train.exclude")
    if faults:
        raise BadConfig.of(faults)
    excluded = set(_matched(chosen, exclude))
    left = [name for name in chosen if name not in excluded]
    if not left:
        why = "train.exclude leaves none of train.targets"
        raise BadConfig("train.no_targets", "no linear is left to adapt", why=why, fix="exclude fewer")
    return left


def sizes(config: TransformerConfig, settings: Train) -> dict[str, Size]:
    """Return the targets of the settings with their rank and alpha; the last override that matches counts.

    Raises `BadConfig` for every pattern that matches nothing or is no regular expression.
    """
    chosen = resolve(config, settings.targets, settings.exclude)
    patterns = [override.pattern for override in settings.overrides]
    if faults := list(_faults(patterns, chosen, "train.overrides")):
        raise BadConfig.of(faults)
    found = dict.fromkeys(chosen, Size(settings.rank, settings.alpha))
    for override in settings.overrides:
        for name in _matched(chosen, [override.pattern]):
            found[name] = Size(override.rank, override.alpha)
    return found


def saved_rank(settings: Train) -> int:
    """Return the rank of the adapters in the saved file, where no override sets another: PiSSA doubles it."""
    pissa = isinstance(settings.adapter, LoRA) and settings.adapter.init == "pissa"
    return 2 * settings.rank if pissa else settings.rank


def portability(adapter: Adapter, targets: Mapping[str, Size]) -> list[str]:
    """Return what people should know before training: which programs will not show this LoRA as it was trained."""
    if isinstance(adapter, DoRA):
        return ["DoRA: diffusers drops dora_scale and shows another picture; ComfyUI reads it"]
    if isinstance(adapter, LoKr):
        return ["LoKr: ComfyUI and diffusers read it, mflux and the Swift app do not"]
    outside = [name for name in targets if not name.startswith(BLOCKS)]
    lines = [f"{', '.join(outside)}: mflux and the Swift app pass over these"] if outside else []
    ranks = {size.rank for name, size in targets.items() if name.endswith(".qkv")}
    return lines + [
        f"rank {rank} is divisible by 3: mflux cannot load such an adapter of qkv; take {rank - 1} or {rank + 1}"
        for rank in sorted(ranks)
        if rank % 3 == 0
    ]


def named(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _matched(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that any of the patterns matches, in their order."""
    expressions = [_expression(pattern) for pattern in patterns]
    return [name for name in names if any(each.fullmatch(name) for each in expressions)]


def _expression(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern. Raises re.error and OverflowError when it is none."""
    own = pattern.startswith(EXPRESSION)
    return re.compile(pattern.removeprefix(EXPRESSION) if own else fnmatch.translate(pattern))


def _faults(patterns: Sequence[str], names: Sequence[str], where: str) -> Iterator[Fault]:
    """Yield a fault for every pattern that is no regular expression or matches none of the names."""
    fix = f"correct the pattern, or take it out of {where}"
    for pattern in patterns:
        try:
            matched = _matched(names, [pattern])
        except (re.error, OverflowError) as error:
            what = f"the pattern {pattern} is no regular expression"
            yield Fault(code="train.bad_pattern", what=what, where=where, why=str(error), fix=fix)
            continue
        if not matched:
            near = difflib.get_close_matches(pattern.removeprefix(EXPRESSION), names, n=3, cutoff=0.0)
            never = "modulation and the embedders of time and guidance are never adapted"
            yield Fault(
                code="train.no_such_target",
                what=f"the pattern {pattern} matches none of {len(names)} linears",
                where=where,
                why=f"nearest: {', '.join(near)}; {never}",
                fix=fix,
            )
