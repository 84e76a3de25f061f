"""From `[model]` to the files of a model: built in, a local folder, or the Hugging Face cache, never the network.

On the fast path of every stage: only JSON is read, nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from schemas.errors import BadConfig, Damaged, Fault, NoResources
from schemas.run import Model
from stages.contract.config import located
from stages.flux2 import configs
from stages.flux2.variants import MICRO, VARIANTS, Variant
from stages.hub import cache

BUILT_IN = (MICRO.name,)
WEIGHTS_SUFFIX = ".safetensors"
# How the transformers of klein are called where they are published: base, or else distilled.
KLEIN_FILE = re.compile(r"flux[._-]?2[._-]klein[._-](base[._-])?[49]b", re.IGNORECASE)
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine. A part's files are safetensors, after their index where they are shards.

    `commit` is that of a model from the hub.
    """

    variant: Variant
    transformer: tuple[Path, ...]
    autoencoder: tuple[Path, ...]
    text_encoder: tuple[Path, ...]
    tokenizer: Path
    source: str
    commit: str | None = None


@dataclass(frozen=True)
class _Places:
    """Where each part lies: a file, or a folder with weights and perhaps a config.json."""

    root: Path | None
    commit: str | None
    transformer: Path
    autoencoder: Path
    text_encoder: Path
    tokenizer: Path


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_model(spec: Model, base_dir: Path, builtin: Callable[[str], Path]) -> ModelFiles:
    """Find the model's files and read what it is.

    `source` is the name of a built-in model, whose folder `builtin` gives, a folder relative to `base_dir`, or a hub
    id. Raises `NoResources` if the model is not on this machine, `Damaged` if its folder is incomplete or not
    FLUX.2, `BadConfig` if `variant` says otherwise than the folder.
    """
    try:
        places = _places(spec, base_dir, builtin)
        variant = _auto(spec, places) if spec.variant == "auto" else _explicit(VARIANTS[spec.variant], spec, places)
        configs.check_fit(places.root or places.transformer, variant)
        return ModelFiles(
            variant=variant,
            transformer=_weights(places.transformer),
            autoencoder=_weights(places.autoencoder),
            text_encoder=_weights(places.text_encoder),
            tokenizer=_tokenizer(places.tokenizer),
            source=spec.source,
            commit=places.commit,
        )
    except OSError as error:
        raise NoResources(
            "model.unreadable",
            "cannot read the model",
            # A read that fails names no file.
            where=str(error.filename or spec.source),
            why=str(error.strerror),
            fix="check the path and its permissions",
        ) from error


def require_trainable(model: ModelFiles, *, allow_distilled: bool) -> None:
    """Raise `BadConfig` for a distilled model, on which LoRAs train badly, unless it is allowed."""
    if not model.variant.distilled or allow_distilled:
        return
    bases = [
        row.hub_id
        for row in VARIANTS.values()
        if row.transformer == model.variant.transformer and not row.distilled and row.hub_id
    ]
    base = f'set model.source = "{bases[0]}"' if bases else "use the base model"
    raise BadConfig(
        "model.distilled",
        f"{model.variant.name} is distilled: train on its base, the LoRA works on both",
        where=model.source,
        fix=f"{base}, or set model.allow_distilled = true",
    )


def _places(spec: Model, base_dir: Path, builtin: Callable[[str], Path]) -> _Places:
    given = (spec.transformer, spec.autoencoder, spec.text_encoder, spec.tokenizer)
    found = None if all(given) else _root(spec, base_dir, builtin)
    root = found.folder if isinstance(found, cache.Snapshot) else found

    def place(override: str | None, below: str) -> Path:
        if override is None:
            assert root is not None
            return root / below
        path = located(override, base_dir)
        if not path.exists():
            raise NoResources(
                "model.absent", "the path does not exist", where=str(path), fix="correct the path in [model]"
            )
        return path

    return _Places(
        root=root,
        commit=found.commit if isinstance(found, cache.Snapshot) else None,
        transformer=place(spec.transformer, "transformer"),
        autoencoder=place(spec.autoencoder, "vae"),
        text_encoder=place(spec.text_encoder, "text_encoder"),
        tokenizer=place(spec.tokenizer, "tokenizer"),
    )


def _root(spec: Model, base_dir: Path, builtin: Callable[[str], Path]) -> Path | cache.Snapshot:
    source, folder = spec.source, located(spec.source, base_dir)
    if spec.revision != cache.MAIN and (source in BUILT_IN or folder.exists()):
        raise BadConfig(
            "model.revision",
            "only a model from the hub has revisions",
            where=f"model.revision = {spec.revision}",
            why=f"model.source is {source}",
            fix="leave out model.revision",
        )
    if source in BUILT_IN:
        return builtin(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BadConfig(
            "model.source",
            "model.source is a file",
            where=str(folder),
            fix=f'set model.transformer = "{source}" and model.variant; model.source gives the other parts',
        )
    if cache.HUB_ID.fullmatch(source):
        return _snapshot(source, spec.revision)
    if re.fullmatch(r"[\w.-]+", source) and not source.startswith("."):
        known = [*BUILT_IN, *(row.hub_id for row in VARIANTS.values() if row.hub_id)]
        near = [VARIANTS[name] for name in difflib.get_close_matches(source, VARIANTS, n=1)]
        raise BadConfig(
            "model.unknown",
            f"no model is called {source}, and no folder",
            where="model.source",
            why=f"expected a folder, a hub id or one of {', '.join(known)}",
            fix=f'set model.source = "{near[0].hub_id or near[0].name}"' if near else "correct model.source",
        )
    raise NoResources(
        "model.absent", "the model folder does not exist", where=str(folder), fix="correct model.source"
    )


def _snapshot(hub_id: str, revision: str) -> cache.Snapshot:
    found = cache.find_snapshot(hub_id, revision)
    if found is None:
        named = "" if revision == cache.MAIN else f" --revision {revision}"
        raise NoResources(
            "model.absent",
            "the model is not on this machine",
            where=f"{hub_id} at {revision}" if named else hub_id,
            why=f"it is neither a folder nor in {cache.hub_cache()}",
            fix=f"flux2-lora fetch {hub_id}{named}",
        )
    return found


def _auto(spec: Model, places: _Places) -> Variant:
    root = places.root
    if root is None or spec.transformer is not None:
        raise BadConfig(
            "model.variant",
            "a transformer given by itself does not say whether it is base or distilled",
            where="model.variant",
            fix=f"set model.variant to one of {', '.join(VARIANTS)}",
        )
    _require_diffusers_layout(root)
    pipeline = configs.read_json(root / "model_index.json", configs.Pipeline)
    return configs.identify(
        configs.read_transformer(_config(places.transformer, root / "transformer")),
        configs.read_text_encoder(_config(places.text_encoder, root / "text_encoder")),
        configs.read_autoencoder(_config(places.autoencoder, root / "vae")),
        distilled=pipeline.is_distilled,
    )


def _require_diffusers_layout(root: Path) -> None:
    """Raise `BadConfig` for a folder of single files, which do not say what they are together."""
    found = [] if (root / "model_index.json").is_file() else sorted(root.glob(f"*{WEIGHTS_SUFFIX}"))
    if found:
        raise BadConfig(
            "model.layout",
            "the folder holds single files, not the layout of diffusers",
            where=str(root),
            why=f"no model_index.json, but {', '.join(path.name for path in found[:3])}",
            fix="name the files as model.transformer, .autoencoder, .text_encoder, .tokenizer, and set model.variant",
        )


def _explicit(row: Variant, spec: Model, places: _Places) -> Variant:
    """Return `row` with the autoencoder found; every part that has a configuration must agree with it."""
    _require_parts(row, spec)
    wrong: list[str] = []
    if places.transformer.is_file() and (name := KLEIN_FILE.search(places.transformer.name)):
        distilled = name[1] is None
        if distilled != row.distilled:
            wrong.append(f"{row.name} is {_kind(distilled=row.distilled)}, {name[0]} is {_kind(distilled=distilled)}")
    if places.root is not None and spec.transformer is None:
        distilled = configs.read_json(places.root / "model_index.json", configs.Pipeline).is_distilled
        if distilled != row.distilled:
            wrong.append(
                f"{row.name} is {_kind(distilled=row.distilled)}, the folder is {_kind(distilled=distilled)}"
            )
    if _has_config(places.transformer):
        found = configs.read_transformer(places.transformer / "config.json")
        wrong += _differences("transformer", found, row.transformer)
    if _has_config(places.text_encoder):
        text = configs.read_text_encoder(places.text_encoder / "config.json")
        if not configs.same_text_encoder(text, row.text_encoder):
            wrong += _differences("text encoder", text, dataclasses.replace(row.text_encoder, length=text.length))
    if wrong:
        raise BadConfig.of(
            Fault(
                code="model.variant",
                what=f"the model is not {row.name}",
                where=str(places.root or places.transformer),
                why=line,
                fix='set model.variant = "auto", or correct model.source',
            )
            for line in wrong
        )
    if _has_config(places.autoencoder):
        return dataclasses.replace(row, autoencoder=configs.read_autoencoder(places.autoencoder / "config.json"))
    return row


def _require_parts(row: Variant, spec: Model) -> None:
    """Raise `BadConfig` where a part would be the built-in model's beside those of a real one."""
    parts = ("transformer", "autoencoder", "text_encoder", "tokenizer")
    absent = [f"model.{part}" for part in parts if getattr(spec, part) is None]
    if absent and spec.source in BUILT_IN and row.name not in BUILT_IN:
        raise BadConfig(
            "model.parts",
            f"parts of {row.name} are not given",
            where="[model]",
            why=f"missing: {', '.join(absent)}",
            fix="name their files, or a folder or hub id that has them as model.source",
        )


def _differences(part: str, found: object, expected: object) -> list[str]:
    return [
        f"{part} {field.name}: expected {getattr(expected, field.name)}, found {getattr(found, field.name)}"
        for field in dataclasses.fields(expected)  # pyright: ignore[reportArgumentType]
        if getattr(found, field.name) != getattr(expected, field.name)
    ]


def _kind(*, distilled: bool) -> str:
    return "distilled" if distilled else "a base model"


def _config(place: Path, fallback: Path) -> Path:
    return (place if _has_config(place) else fallback) / "config.json"


def _has_config(place: Path) -> bool:
    return (place / "config.json").is_file()


def _weights(place: Path) -> tuple[Path, ...]:
    """Return the weight files at `place`: one file, or a folder's shards behind their index, or all it has."""
    if place.is_file():
        if place.name.endswith(INDEX_SUFFIX):
            return _shards(place)
        if place.suffix != WEIGHTS_SUFFIX:
            gguf = place.suffix.lower() == ".gguf"
            raise Damaged(
                "model.format",
                "this is a GGUF file, not a safetensors file" if gguf else "not a safetensors file",
                where=str(place),
                fix="use a .safetensors file in bfloat16; model.quantize packs what is loaded"
                if gguf
                else "use a .safetensors file; pickles (.pt, .bin, .ckpt) are never read",
            )
        return (place,)
    indices = sorted(place.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise Damaged(
            "model.weights",
            "several indices of weights in one folder",
            where=str(place),
            why=", ".join(path.name for path in indices),
            fix="keep the files of one model only",
        )
    if indices:
        return _shards(indices[0])
    found = sorted(place.glob(f"*{WEIGHTS_SUFFIX}"))
    # A link into a cache may lead nowhere.
    if not found or not all(path.is_file() for path in found):
        raise _incomplete(place, f"no {WEIGHTS_SUFFIX} file, or links to files that are gone")
    return tuple(found)


def _shards(index: Path) -> tuple[Path, ...]:
    names = sorted(set(configs.read_json(index, _Index).weight_map.values()))
    outside = [name for name in names if Path(name).name != name or not name.endswith(WEIGHTS_SUFFIX)]
    if outside:
        raise Damaged(
            "model.index",
            "the index names something else than files beside it",
            where=str(index),
            why=f"found {outside[0]!r}",
            fix="download the model again",
        )
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent or not names:
        raise _incomplete(
            index.parent, f"{len(absent)} of {len(names)} weight files are absent: {', '.join(absent[:3])}"
        )
    return (index, *(index.parent / name for name in names))


def _tokenizer(place: Path) -> Path:
    path = place / "tokenizer.json" if place.is_dir() else place
    if not path.is_file():
        raise _incomplete(path, "no tokenizer.json")
    if path.suffix != ".json" or path.name == "tekken.json":
        raise Damaged(
            "model.tokenizer",
            "not a tokenizer in Hugging Face's format",
            where=str(path),
            why="expected a tokenizer.json",
            fix="use the tokenizer.json of the model's tokenizer folder on the hub",
        )
    return path


def _incomplete(place: Path, why: str) -> Damaged:
    return Damaged(
        "model.missing",
        "the model folder is incomplete",
        where=str(place),
        why=why,
        fix="fetch the model again (flux2-lora fetch ID), or correct model.source",
    )
