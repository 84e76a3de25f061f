"""Reading anyone's LoRA of a FLUX.2 transformer: every known spelling in one table, everything else refused."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import msgspec

from schemas.errors import Damaged, Fault
from stages.flux2.variants import TransformerConfig
from stages.lora.formats import bfl, diffusers, kohya
from stages.lora.formats.places import Place
from stages.lora.layer import Factors
from stages.lora.targets import linear_shapes

SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
ADAPTER_METADATA = "lora_adapter_metadata"
NAMED = 3
OTHER_FILE = "use a LoRA made for this model"


class Pair(NamedTuple):
    """One adapter as the file holds it: A [r, in], B [out, r], and alpha where the file has one."""

    A: mx.array
    B: mx.array
    alpha: mx.array | None


Parts = dict[str, mx.array]


def read(
    tensors: Mapping[str, mx.array], metadata: Mapping[str, str], config: TransformerConfig, where: str = ""
) -> Factors:
    """Return a LoRA file's factors as float32, any scale folded into B.

    Adapters apart on q, k and v become one on the fused linear, exactly: with their common A if it is one, else
    side by side (rank 3r). Raises `Damaged`, all faults at once, if a tensor fits nothing, lacks its other half,
    has the wrong shape or type, or is not finite. `where` names the file.
    """
    parts, faults = _sort(tensors, config)
    pairs = {
        place: Pair(held["A"], held["B"], held.get("alpha")) for place, held in parts.items() if {"A", "B"} <= {*held}
    }
    halves = [_text(place) for place in parts if place not in pairs]
    faults += [*_fault("lora.missing_half", "adapters lack A or B", halves), *_pair_faults(pairs, config)]
    if faults:
        raise Damaged.of(msgspec.structs.replace(fault, where=where, fix=OTHER_FILE) for fault in faults)
    scale = _adapter_scale(metadata, where)
    by_module: dict[str, dict[int | None, Pair]] = defaultdict(dict)
    for (module, third), pair in pairs.items():
        by_module[module][third] = _scaled(pair, scale)
    return _factors(by_module, config)


def _sort(tensors: Mapping[str, mx.array], config: TransformerConfig) -> tuple[dict[Place, Parts], list[Fault]]:
    """Put every tensor in its place; list those that have none, or share one."""
    spellings = bfl.spellings(config) | diffusers.spellings(config) | kohya.spellings(config)
    parts: dict[Place, Parts] = {}
    whole: dict[str, bool] = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")
        place = spellings.get(key.removesuffix(suffix)) if suffix else None
        if place is None:
            unknown.append(key)
            continue
        # One linear is adapted either as a whole or by thirds, and each half of an adapter is given once.
        mixed = whole.setdefault(place.module, place.third is None) != (place.third is None)
        if mixed or SUFFIXES[suffix] in parts.get(place, {}):
            twice.append(key)
        else:
            parts.setdefault(place, {})[SUFFIXES[suffix]] = tensor
    empty = [Fault(code="lora.empty", what="no adapter of this model in the file")]
    return parts, [
        *_fault("lora.unknown_key", "names fit no linear of this model", unknown),
        *_fault("lora.twice", "names mean a tensor that another name already gave", twice),
        *([] if parts or unknown else empty),
    ]


def _pair_faults(pairs: Mapping[Place, Pair], config: TransformerConfig) -> Iterator[Fault]:
    shapes = linear_shapes(config)
    shape, dtype, unsound = [], [], []
    for place, (a, b, alpha) in pairs.items():
        rows, columns = shapes[place.module]
        rank = a.shape[0] if a.ndim == 2 else 0
        expected = ((rank, columns), (rows if place.third is None else rows // 3, rank))
        if (a.shape, b.shape) != expected or rank == 0 or (alpha is not None and alpha.size != 1):
            shape.append(f"{_text(place)} A {a.shape} B {b.shape}, expected A {expected[0]} B {expected[1]}")
        elif a.dtype not in FLOATS or b.dtype not in FLOATS:
            dtype.append(_text(place))
        elif not all(mx.isfinite(part).all().item() for part in (a, b)):
            unsound.append(_text(place))
    yield from _fault("lora.shape", "adapters do not fit this model's linears", shape)
    yield from _fault("lora.dtype", "adapters are not float32, bfloat16 or float16", dtype)
    yield from _fault("lora.not_finite", "adapters hold infinite or undefined numbers", unsound)


def _adapter_scale(metadata: Mapping[str, str], where: str) -> float:
    """Return alpha / rank of peft's configuration where the file carries one, as diffusers applies it."""
    if ADAPTER_METADATA not in metadata:
        return 1.0
    try:
        fields = json.loads(metadata[ADAPTER_METADATA])
        scale = fields["transformer.lora_alpha"] / fields["transformer.r"]
        plain = not (fields.get("transformer.alpha_pattern") or fields.get("transformer.rank_pattern"))
    except (ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise Damaged(
            "lora.metadata", f"{ADAPTER_METADATA} is unreadable", where=where, why=repr(error), fix=OTHER_FILE
        ) from error
    if fields.get("transformer.use_rslora") or fields.get("transformer.use_dora") or not plain:
        what = "rsLoRA, DoRA and a scale of its own per module are not supported"
        raise Damaged("lora.metadata", what, where=where, fix=OTHER_FILE)
    return scale


def _scaled(pair: Pair, scale: float) -> Pair:
    a, b = pair.A.astype(mx.float32), pair.B.astype(mx.float32)
    if pair.alpha is not None:
        return Pair(a, b * (pair.alpha.astype(mx.float32).reshape(()) / a.shape[0]), None)
    return Pair(a, b * scale, None)


def _factors(by_module: Mapping[str, Mapping[int | None, Pair]], config: TransformerConfig) -> Factors:
    factors: Factors = {}
    for module, (rows, _) in linear_shapes(config).items():
        if pairs := by_module.get(module):
            a, b = pairs[None][:2] if None in pairs else _fuse(pairs, rows // 3)
            factors[f"{module}.lora_A"], factors[f"{module}.lora_B"] = a, b
    return factors


def _fuse(pairs: Mapping[int | None, Pair], rows: int) -> tuple[mx.array, mx.array]:
    """Make one adapter of those on q, k and v (some may be absent): B's rows below each other."""
    first = next(iter(pairs.values()))
    if len(pairs) == 3 and all(mx.array_equal(pair.A, first.A).item() for pair in pairs.values()):
        return first.A, mx.concatenate([pairs[third].B for third in range(3)], axis=0)
    ordered = sorted(pairs.items(), key=lambda item: item[0] or 0)
    a = mx.concatenate([pair.A for _, pair in ordered], axis=0)
    b = mx.zeros((3 * rows, a.shape[0]))
    start = 0
    for third, pair in ordered:
        top, rank = (third or 0) * rows, pair.A.shape[0]
        b[top : top + rows, start : start + rank] = pair.B
        start += rank
    return a, b


def _text(place: Place) -> str:
    return place.module if place.third is None else f"{place.module} {'qkv'[place.third]}"


def _fault(code: str, what: str, found: Iterable[str]) -> Iterator[Fault]:
    """Yield one fault that counts and names what was found, or none."""
    names = list(found)
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield Fault(code=code, what=f"{len(names)} {what}", why=", ".join(names[:NAMED]) + more)
