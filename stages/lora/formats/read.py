"""Reading anyone's LoRA of a FLUX.2 transformer: every known spelling in one table, everything else refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import mlx.core as mx
import msgspec

from schemas.errors import Damaged, Fault
from stages.flux2.variants import TransformerConfig
from stages.lora.formats import bfl, diffusers, kohya, kronecker, low_rank
from stages.lora.formats.places import Place
from stages.lora.formats.scale import adapter_scale
from stages.lora.layer import Factors, Parts
from stages.lora.targets import linear_shapes, named

# What follows a linear's name -> what it is: parts of one adapter.
SUFFIXES = low_rank.SUFFIXES | kronecker.SUFFIXES | {".alpha": "alpha"}
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
OTHER_FILE = "use a LoRA made for this model"

Adapters = dict[Place, Parts]


def read(
    tensors: Mapping[str, mx.array], metadata: Mapping[str, str], config: TransformerConfig, where: str = ""
) -> Factors:
    """Return a LoRA file's factors as float32, any scale folded in: lora_A and lora_B, or lokr_w1 and lokr_w2.

    A DoRA has `dora_scale` or `lora_magnitude_vector` [out] besides, as the file means it. Adapters apart on q, k
    and v become one on the fused linear, exactly: with their common A if it is one, else side by side (rank 3r).
    Raises `Damaged`, all faults at once, if a tensor fits nothing, lacks its other half, has the wrong shape or
    type, or is not finite. `where` names the file.
    """
    adapters, faults = _sort(tensors, config)
    krons = {place: parts for place, parts in adapters.items() if kronecker.is_kronecker(parts)}
    plain = {place: parts for place, parts in adapters.items() if place not in krons}
    faults += [*_shape_faults(plain, krons, config), *_number_faults(adapters)]
    if faults:
        raise Damaged.of(msgspec.structs.replace(fault, where=where, fix=OTHER_FILE) for fault in faults)
    scale = adapter_scale(metadata, where, OTHER_FILE)
    found = low_rank.factors(plain, config, scale) | kronecker.factors(krons)
    order = list(linear_shapes(config))
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].rpartition(".")[0])))


def _sort(tensors: Mapping[str, mx.array], config: TransformerConfig) -> tuple[Adapters, list[Fault]]:
    """Put every tensor in its place; list those that have none, or share one."""
    spellings = bfl.spellings(config) | diffusers.spellings(config) | kohya.spellings(config)
    parts: Adapters = {}
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


def _number_faults(adapters: Adapters) -> Iterator[Fault]:
    dtype = [
        str(place)
        for place, parts in adapters.items()
        if any(part.dtype not in FLOATS for name, part in parts.items() if name != "alpha")
    ]
    sound = {place: parts for place, parts in adapters.items() if str(place) not in dtype}
    unsound = [
        str(place)
        for place, parts in sound.items()
        if not all(mx.isfinite(part).all().item() for part in parts.values())
    ]
    yield from _fault("lora.dtype", "adapters are not float32, bfloat16 or float16", dtype)
    yield from _fault("lora.not_finite", "adapters hold infinite or undefined numbers", unsound)


def _shape_faults(plain: Adapters, krons: Adapters, config: TransformerConfig) -> Iterator[Fault]:
    halves = [str(place) for place, parts in chain(plain.items(), krons.items()) if not _complete(parts)]
    whole = {place: parts for place, parts in plain.items() if _complete(parts)}
    fused = {place: parts for place, parts in krons.items() if _complete(parts) and place.third is None}
    shapes = [*low_rank.wrong_shapes(whole, config), *kronecker.wrong_shapes(fused, config)]
    yield from _fault("lora.missing_half", "adapters lack A or B, or a factor of their product", halves)
    yield from _fault("lora.shape", "adapters do not fit this model's linears", shapes)
    yield from _fault("lora.dora_part", "DoRAs cover only some of q, k and v", low_rank.partial_doras(whole))
    thirds = [str(place) for place in krons if place.third is not None]
    yield from _fault("lora.lokr_part", "LoKrs are on q, k or v alone, which no fused one equals", thirds)


def _complete(parts: Parts) -> bool:
    return kronecker.complete(parts) if kronecker.is_kronecker(parts) else low_rank.complete(parts)


def _fault(code: str, what: str, found: Iterable[str]) -> Iterator[Fault]:
    """Yield one fault that counts and names what was found, or none."""
    names = list(found)
    if names:
        yield Fault(code=code, what=f"{len(names)} {what}", why=named(names))
