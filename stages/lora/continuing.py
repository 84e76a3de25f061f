"""Training on from an existing LoRA: what the file holds must be what the settings train, or it is an error."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.adapter import Adapter as Spec
from schemas.adapter import LoKr
from schemas.errors import BadConfig, Fault
from stages.flux2.variants import TransformerConfig
from stages.lora import lokr
from stages.lora.layer import Factors, Parts, by_module
from stages.lora.targets import NAMED, SETS, Size, linear_shapes, named, resolve


def require_match(spec: Spec, config: TransformerConfig, sizes: dict[str, Size], start: Factors) -> None:
    """Raise BadConfig, every fault with its remedy, unless a file's factors are what the settings train."""
    found = by_module(start)
    kinds = {_kind(parts) for parts in found.values()}
    faults = list(_target_faults(config, list(sizes), list(found)))
    if kinds != {_tag(spec)}:
        why = f"train.adapter is {_tag(spec)}, the file holds {' and '.join(sorted(kinds))}"
        fix = f'set train.adapter.kind = "{min(kinds)}"' if len(kinds) == 1 else "use a LoRA of one kind"
        faults.append(_fault("kind", "init_lora is of another kind", why, fix))
    elif not faults:
        faults += _size_faults(spec, config, sizes, found)
    if faults:
        raise BadConfig.of(faults)


def _target_faults(config: TransformerConfig, targets: list[str], found: list[str]) -> Iterator[Fault]:
    missing, extra = [name for name in targets if name not in found], [name for name in found if name not in targets]
    if missing or extra:
        parts = [
            f"{len(names)} {what}: {named(names)}"
            for names, what in ((missing, "targets are not in the file"), (extra, "of the file are no targets"))
            if names
        ]
        same = next((f'"{name}"' for name in SETS if set(resolve(config, name)) == set(found)), None)
        fix = f"set train.targets = {same or 'patterns for the ' + str(len(found)) + ' linears of the file'}"
        yield _fault("targets", "init_lora adapts other linears than train.targets", "; ".join(parts), fix)


def _size_faults(
    spec: Spec, config: TransformerConfig, sizes: dict[str, Size], found: dict[str, Parts]
) -> Iterator[Fault]:
    shapes = linear_shapes(config)
    if isinstance(spec, LoKr):
        expected = {
            name: lokr.fresh_parts(shapes[name], size.rank, spec.factor, seed=0, module=name)
            for name, size in sizes.items()
        }
        wrong = [name for name in sizes if _shapes(found[name]) != _shapes(expected[name])]
        if wrong:
            why = f"{named(wrong)}: expected {_shapes(expected[wrong[0]])}, found {_shapes(found[wrong[0]])}"
            fix = "set train.adapter.factor and train.rank to those the file was trained with"
            yield _fault("size", "init_lora is split otherwise", why, fix)
        return
    ranks = {name: found[name]["lora_A"].shape[0] for name in sizes}
    wrong = [name for name, size in sizes.items() if ranks[name] != size.rank]
    if wrong:
        why = ", ".join(f"{name} has rank {ranks[name]}, not {sizes[name].rank}" for name in wrong[:NAMED])
        one = len(set(ranks.values())) == 1
        fix = f"set train.rank = {ranks[wrong[0]]}" if one else "give each its rank in [[train.overrides]]"
        yield _fault("rank", f"init_lora has another rank in {len(wrong)} linears", why, fix)


def _fault(code: str, what: str, why: str, fix: str) -> Fault:
    return Fault(code=f"train.init_lora_{code}", what=what, where="train.init_lora", why=why, fix=fix)


def _kind(parts: Parts) -> str:
    if "lokr_w1" in parts:
        return "lokr"
    return "lora" if parts.keys() == {"lora_A", "lora_B"} else "dora"


def _tag(spec: Spec) -> str:
    return str(type(spec).__struct_config__.tag)


def _shapes(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {name: part.shape for name, part in sorted(parts.items())}
