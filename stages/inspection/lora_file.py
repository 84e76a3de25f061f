"""One LoRA file, judged alone: who wrote it, of what, whether it is whole, who can read it, what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import BadConfig, Damaged, Fault, NoResources
from stages.flux2.folder import ModelFiles
from stages.flux2.variants import VARIANTS, TransformerConfig
from stages.lora.formats.readers import Verdict, readers, spelling

if TYPE_CHECKING:
    from stages.lora.layer import Factors
    from stages.stores.tensors import TensorFile

# Of what a file says about itself: one entry, and one line for a person. This project writes 64 KiB in all.
MOST_SAID_CHARACTERS = 64 << 10
MOST_SHOWN_CHARACTERS = 300
# What the settings in the metadata are shown by.
SHOWN = ("steps", "learning_rate", "rank", "alpha", "batch_size", "seed")


class Judgement(msgspec.Struct, kw_only=True):
    """What can be said of a file. `modules` are its linears, `fits` the models all of it fits, `says` its metadata.

    `velocity` is how far it moves the velocity of a fixed latent, relative to that, where a model was given.
    """

    producer: str
    kind: str
    ranks: dict[str, int]
    modules: int
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    sha256: str
    tensor_digest: str
    tensor_digest_said: str | None
    says: dict[str, str]
    fits: list[str]
    readers: dict[str, tuple[Verdict, str]]
    velocity: float | None = None


@dataclass
class Judged:
    """A judgement, the faults it found, the hints, and what was not looked at."""

    about: Judgement
    faults: list[Fault] = field(default_factory=list[Fault])
    hints: list[Fault] = field(default_factory=list[Fault])
    not_checked: list[str] = field(default_factory=list[str])


def judge(path: Path, model: ModelFiles | None) -> Judged:
    """Return what is to be said of the LoRA file, with a model also whether it fits and what it does to it.

    Raises Damaged when it is no whole safetensors file.
    """
    from stages.stores.tensors import TENSOR_DIGEST, load, tensor_digest

    file = load(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    spelled = spelling(shapes, file.metadata)
    configs = {model.variant.name: model.variant.transformer} if model else _shapes_known()
    says = {name: text for name, text in file.metadata.items() if len(name) + len(text) <= MOST_SAID_CHARACTERS}
    fitting, refused = _fitting(file, configs, str(path))
    found = Judged(
        Judgement(
            producer=spelled.producer,
            kind=spelled.kind,
            ranks={str(rank): count for rank, count in sorted(Counter(spelled.ranks.values()).items())},
            modules=len({name.rpartition(".")[0] for name in next(iter(fitting.values()), spelled.ranks)}),
            parameters=sum(prod(shape) for shape in shapes.values()),
            dtypes=dict(Counter(tensor.dtype for tensor in file.tensors.values())),
            bytes=path.stat().st_size,
            sha256=file.sha256,
            tensor_digest=tensor_digest(file.tensors),
            tensor_digest_said=says.get(TENSOR_DIGEST),
            says=says,
            fits=list(fitting),
            readers=readers(spelled),
        )
    )
    if long := len(file.metadata) - len(says):
        found.not_checked.append(f"{long} entries of its metadata, of more than {MOST_SAID_CHARACTERS} characters")
    _look(found, path, fitting, refused)
    if model is None:
        found.not_checked.append("what it does to a model (--model, or --config)")
    elif factors := fitting.get(model.variant.name):
        _try_on(found, path, model, factors)
    return found


def _shapes_known() -> dict[str, TransformerConfig]:
    """Return one name for each shape of transformer there is: the base model's."""
    known: dict[TransformerConfig, str] = {}
    for name, variant in VARIANTS.items():
        if variant.transformer not in known or not variant.distilled:
            known[variant.transformer] = name
    return {name: config for config, name in known.items()}


def _fitting(
    file: TensorFile, configs: Mapping[str, TransformerConfig], where: str
) -> tuple[dict[str, Factors], dict[str, Damaged]]:
    """Return by model the factors of the file as that model reads it, or what is wrong."""
    from stages.lora.formats.read import read
    from stages.stores.tensors import to_mlx

    tensors = {name: to_mlx(tensor, where=where) for name, tensor in file.tensors.items()}
    fitting: dict[str, Factors] = {}
    refused: dict[str, Damaged] = {}
    for name, config in configs.items():
        try:
            fitting[name] = read(tensors, file.metadata, config)
        except Damaged as error:
            refused[name] = error
    return fitting, refused


def _look(found: Judged, path: Path, fitting: Mapping[str, Factors], refused: Mapping[str, Damaged]) -> None:
    """Note what is wrong with the file by itself."""
    from stages.lora.layer import learnt

    about = found.about
    if about.tensor_digest_said not in (None, about.tensor_digest):
        found.faults.append(
            Fault(
                code="lora.digest",
                what="the tensors are not those whose digest the file carries",
                where=str(path),
                why=f"expected {_short(about.tensor_digest_said)}, found {about.tensor_digest}",
                fix="take the file from where it was made",
            )
        )
    if not fitting:
        # Of several models the one whose linears it means: the others complain about names and shapes.
        named = {"lora.unknown_key", "lora.shape"}
        nearest = min(refused.values(), key=lambda error: len({fault.code for fault in error.faults} & named))
        found.faults += [msgspec.structs.replace(fault, where=str(path)) for fault in nearest.faults]
    elif not learnt(next(iter(fitting.values()))):
        found.faults.append(
            Fault(
                code="lora.zero",
                what="every up-matrix is zero: this LoRA does nothing",
                where=str(path),
                fix="train again with a higher learning rate",
            )
        )


def _try_on(found: Judged, path: Path, model: ModelFiles, factors: Factors) -> None:
    """Note whether the file was trained on this model, and how far it moves the velocity of a fixed latent."""
    from stages.flux2.backend import prepare
    from stages.flux2.load import load_transformer, transformer_digest
    from stages.lora.effect import velocity_moved

    said = found.about.says.get("base_model_digest")
    try:
        if said not in (None, transformer_digest(model)):
            base = found.about.says.get("base_model", "unknown")
            what = f"it was trained on other weights than those of {model.source}: {_short(base)}"
            found.hints.append(
                Fault(code="lora.other_base", what=what, fix="base and distilled siblings share LoRAs")
            )
        found.about.velocity = velocity_moved(load_transformer(model, prepare().compute_dtype), factors)
    except (BadConfig, NoResources) as error:
        found.not_checked.append(f"what it does to the model ({error.faults[0].what})")
        return
    if not found.about.velocity:
        found.faults.append(
            Fault(
                code="lora.no_effect",
                what="it changes nothing of what the model predicts",
                where=str(path),
                fix="train again with a higher learning rate",
            )
        )


def page(path: Path, found: Judged) -> list[str]:
    """Return the judgement as the lines that people read."""
    about = found.about
    ranks = ", ".join(f"{rank} ({count})" for rank, count in about.ranks.items())
    dtypes = ", ".join(about.dtypes)
    said = {None: "carries none", about.tensor_digest: "as the file says"}.get(about.tensor_digest_said, "CHANGED")
    rows = [
        ("kind", f"{about.kind} on {about.modules} linears" + (f", rank {ranks}" if ranks else "")),
        ("size", f"{about.parameters:,} numbers, {dtypes}, {about.bytes / 1e6:.1f} MB"),
        ("trained", _training(about.says)),
        ("made of", _lineage(about.says)),
        ("digest", f"{about.tensor_digest[:16]}... ({said})"),
        ("fits", ", ".join(about.fits) or "no model known here"),
    ]
    if about.velocity is not None:
        rows.append(("does", f"moves the velocity of a fixed latent by {about.velocity:.2%}"))
    rows += [(name, f"{verdict}{f': {why}' if why else ''}") for name, (verdict, why) in about.readers.items()]
    rows.append(("left out", "; ".join(found.not_checked)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{path.name}, by {about.producer}", *(f"  {name:<{width}}  {text}" for name, text in rows if text)]
    return [_short(line) for line in lines]


def _short(text: str) -> str:
    return text if len(text) <= MOST_SHOWN_CHARACTERS else f"{text[:MOST_SHOWN_CHARACTERS]}..."


def _training(says: Mapping[str, str]) -> str:
    try:
        config: dict[str, Any] = msgspec.json.decode(says["config"], type=dict[str, Any])
    except (KeyError, *UNREADABLE):
        return ""
    shown = [f"{name.replace('_', ' ')} {config[name]}" for name in SHOWN if name in config]
    optimizer = config.get("optimizer")
    kind = optimizer.get("kind") if isinstance(optimizer, dict) else None
    return ", ".join([f"step {says.get('step', '?')}", *shown, *([str(kind)] if kind else [])])


def _lineage(says: Mapping[str, str]) -> str:
    named = {
        "base_model_digest": says.get("base_model", "base model"),
        "dataset_digest": "dataset",
        "trajectory": "training",
    }
    return ", ".join(f"{name} {says[key][:8]}" for key, name in named.items() if key in says)
