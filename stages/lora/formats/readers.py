"""Which programs load a LoRA file, and as what it was meant: judged by names, shapes and metadata alone.

Facts of diffusers 0.42.1 (run), ComfyUI, ai-toolkit, mflux and flux-2-swift-mlx (read in their source, 2026-11).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from schemas.errors import Damaged
from stages.lora.formats.scale import ADAPTER_METADATA, adapter_scale

# Those that stand in front of a linear's name, longest first.
PREFIXES = ("base_model.model.", "diffusion_model.", "lora_transformer_", "transformer.", "lora_unet_", "lycoris_")
BFL = re.compile(r"(double_blocks|single_blocks|img_in|txt_in|time_in|guidance_in|final_layer|\w*_modulation)[._]")
DIFFUSERS = re.compile(
    r"(transformer_blocks|single_transformer_blocks|x_embedder|context_embedder|proj_out|norm_out|time_guidance_embed)[._]"
)
INSIDE = re.compile(r"(double|single|transformer)_blocks[._]")
# Searched, not matched from the front by a lazy rest, which takes the square of a long name's length.
SUFFIX = re.compile(r"(lora_|lokr_|dora_|alpha\Z|diff).*")
QKV_A = re.compile(r"(img|txt)_attn[._]qkv\.lora_(A|down)\.weight")

Verdict = Literal["loads", "loads in part", "shows another picture", "loads nothing", "refuses it", "not known"]
OUTSIDE: tuple[Verdict, str] = "loads in part", "what lies outside the blocks is lost"


@dataclass(frozen=True)
class Spelling:
    """How a file spells its linears: prefixes, whose names, what follows them; `ranks` of its A by name."""

    prefixes: frozenset[str]
    names: frozenset[Literal["bfl", "diffusers", "other"]]
    suffixes: frozenset[str]
    keys: tuple[str, ...]
    ranks: Mapping[str, int]
    metadata: Mapping[str, str]

    @property
    def down_up(self) -> bool:
        """Whether factors are called lora_down and lora_up."""
        return any(suffix.startswith(("lora_down", "lora_up")) for suffix in self.suffixes)

    @property
    def outside(self) -> bool:
        """Whether some linear lies outside the blocks."""
        return not all(INSIDE.search(key) for key in self.keys)

    @property
    def alpha(self) -> bool:
        """Whether there are alpha tensors."""
        return "alpha" in self.suffixes

    @property
    def kind(self) -> Literal["LoRA", "DoRA", "LoKr", "unknown"]:
        """What the adapters are."""
        from stages.lora.formats.kronecker import NAMES
        from stages.lora.formats.low_rank import MAGNITUDES

        if self.suffixes & set(NAMES):
            return "LoKr"
        if self.suffixes & set(MAGNITUDES):
            return "DoRA"
        return "LoRA" if any(suffix.startswith("lora_") for suffix in self.suffixes) else "unknown"

    @property
    def producer(self) -> str:
        """Who wrote the file, by what it says or how it spells."""
        software = self.metadata.get("software", "")
        if software.startswith("flux2-lora"):
            return software
        if "ai-toolkit" in software or "ai-toolkit" in self.metadata.get("training_info", ""):
            return "ai-toolkit"
        if "mflux_version" in self.metadata:
            return f"mflux {self.metadata['mflux_version']}"
        if self.metadata.get("format") == "diffusers" or "target_model" in self.metadata:
            return "flux-2-swift-mlx"
        if any(name.startswith("ss_") for name in self.metadata) or "lora_unet_" in self.prefixes:
            return "kohya or musubi-tuner"
        if ADAPTER_METADATA in self.metadata or ("transformer." in self.prefixes and "diffusers" in self.names):
            return "diffusers"
        if "base_model.model." in self.prefixes:
            return "peft"
        return "lycoris" if "lycoris_" in self.prefixes else "unknown"


def spelling(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Spelling:
    """Return how a file spells its linears, of its tensors' names and shapes."""
    prefixes: set[str] = set()
    names: set[Literal["bfl", "diffusers", "other"]] = set()
    suffixes: set[str] = set()
    for key in shapes:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        prefixes.add(prefix)
        rest = key.removeprefix(prefix)
        names.add("diffusers" if DIFFUSERS.match(rest) else "bfl" if BFL.match(rest) else "other")
        suffix = SUFFIX.search(rest)
        suffixes.add(suffix[0] if suffix else rest)
    halves = {key: shape for key, shape in shapes.items() if key.endswith((".lora_A.weight", ".lora_down.weight"))}
    ranks = {key: shape[0] for key, shape in halves.items() if shape}
    return Spelling(frozenset(prefixes), frozenset(names), frozenset(suffixes), tuple(shapes), ranks, metadata)


def readers(file: Spelling) -> dict[str, tuple[Verdict, str]]:
    """Return for each program what it makes of the file, and why; "" where it simply loads."""
    if "other" in file.names or len(file.prefixes) != 1:
        return dict.fromkeys(READERS, ("not known", "names of several kinds, or of no FLUX.2 linear"))
    return {name: rule(file) for name, rule in READERS.items()}


def _comfyui(file: Spelling) -> tuple[Verdict, str]:
    known = {("diffusion_model.", "bfl"), ("lora_unet_", "bfl")}
    known |= {(prefix, "diffusers") for prefix in ("transformer.", "lycoris_", "lora_transformer_", "")}
    if not known & _spelled(file):
        return "loads nothing", "it knows these names under other prefixes only"
    return _at_scale_one(file)


def _diffusers(file: Spelling) -> tuple[Verdict, str]:
    [prefix], apart = file.prefixes, "diffusers" in file.names
    if prefix == "lora_unet_":
        return "loads", ""
    if prefix in ("", "lora_transformer_", "lycoris_"):
        return "loads nothing", "it needs the prefix transformer. or diffusion_model."
    if file.down_up:
        return "loads nothing", "lora_down and lora_up only count under lora_unet_"
    if file.alpha:
        return "refuses it", "alpha tensors are left over"
    if prefix == "transformer." and not apart:
        return "refuses it", "BFL names under transformer."
    if file.kind == "LoKr":
        return "loads", "newer releases only"
    if file.kind == "DoRA":
        return "shows another picture", "it drops dora_scale"
    if any("final_layer.adaLN_modulation" in key for key in file.keys):
        return "shows another picture", "it swaps shift and scale of final_layer.adaLN_modulation"
    return "loads", ""


def _ai_toolkit(file: Spelling) -> tuple[Verdict, str]:
    if not {("diffusion_model.", "bfl"), ("transformer.", "bfl")} & _spelled(file):
        return "loads nothing", "it knows BFL names under diffusion_model. only"
    if file.down_up:
        return "loads nothing", "it knows lora_A and lora_B only"
    return _at_scale_one(file)


def _mflux(file: Spelling) -> tuple[Verdict, str]:
    known = {(prefix, "diffusers") for prefix in ("", "transformer.", "diffusion_model.")}
    known |= {(prefix, "bfl") for prefix in ("lora_unet_", "diffusion_model.", "base_model.model.")}
    if not known & _spelled(file):
        return "loads nothing", "it knows these names under other prefixes only"
    if file.kind != "LoRA":
        return "refuses it", f"no {file.kind}"
    if threes := sorted({rank for key, rank in file.ranks.items() if QKV_A.search(key) and rank % 3 == 0}):
        return "refuses it", f"rank {threes[0]} of qkv is divisible by 3"
    return OUTSIDE if file.outside else _at_scale_one(file, "klein only")


def _swift(file: Spelling) -> tuple[Verdict, str]:
    if not file.prefixes & {"", "transformer.", "diffusion_model.", "base_model.model."} or file.down_up:
        return "loads nothing", "it knows lora_A.weight and lora_B.weight behind dots only"
    if file.kind == "LoKr":
        return "loads nothing", "no LoKr"
    if file.kind == "DoRA":
        return "shows another picture", "it passes over dora_scale"
    if file.alpha:
        return "shows another picture", "it passes over alpha tensors"
    if "diffusers" in file.names and any("ff.linear_in" in key or "ff_context.linear_in" in key for key in file.keys):
        return "loads in part", "ff.linear_in and ff_context.linear_in are lost"
    if file.outside:
        return OUTSIDE
    # It knows that scale by a name of its own.
    return ("loads", "") if "lora_alpha" in file.metadata else _at_scale_one(file)


def _at_scale_one(file: Spelling, why: str = "") -> tuple[Verdict, str]:
    """Return the verdict on a program that passes over peft's configuration, which diffusers alone applies."""
    if _peft_scale(file.metadata) != 1.0:
        return "shows another picture", f"it passes over the scale in {ADAPTER_METADATA}"
    return "loads", why


def _spelled(file: Spelling) -> set[tuple[str, str]]:
    return {(prefix, name) for prefix in file.prefixes for name in file.names}


def _peft_scale(metadata: Mapping[str, str]) -> float:
    """Return the scale of peft's configuration; 1 where there is none that can be read."""
    try:
        return adapter_scale(metadata, "", "")
    except Damaged:
        return 1.0


READERS = {
    "ComfyUI": _comfyui,
    "diffusers": _diffusers,
    "ai-toolkit": _ai_toolkit,
    "mflux": _mflux,
    "Swift app": _swift,
}
