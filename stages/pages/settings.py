"""The settings that a run was made with, beside their defaults, and those in which runs differ.

They come from the artifacts: what was keyed is what acted, whatever the pipeline's file says by now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from schemas.base import Strict
from schemas.encode_latents import EncodeLatents
from schemas.encode_text import EncodeText
from schemas.preview import Preview
from schemas.run import Run
from schemas.train import Train
from schemas.validate import Validate
from stages.contract.artifacts import keyed
from stages.contract.runner import flattened
from stages.pages.record import Record

TABLES: dict[str, type[Strict]] = {
    "validate": Validate,
    "encode-latents": EncodeLatents,
    "encode-text": EncodeText,
    "train": Train,
    "preview": Preview,
}
REQUIRED: dict[str, dict[str, Any]] = {"validate": {"dataset": "."}}
# What the stage worked out itself, or took from the model.
WORKED_OUT = {
    "validate": ("plan_version", "text_length"),
    "encode-text": ("layers", "length", "class_captions"),
    "preview": ("steps", "guidance"),
}
# Said elsewhere: it encodes what `preview.prompts` asks for.
TWICE = "encode_text.prompts"
ABSENT = "not set"


@dataclass(frozen=True)
class Setting:
    """One value by its dotted name, its default ("" where the stage works it out), and whether they differ."""

    name: str
    value: str
    default: str
    changed: bool


def settings_of(record: Record) -> list[Setting]:
    """Return every keyed setting of the run, stage by stage; those of a training under way are its own."""
    params = {stage: manifest.params for stage, manifest in record.made.items()}
    if record.training is not None:
        params["train"] = dict(record.training.params)
    found = [each for stage in TABLES if stage in params for each in _of_stage(stage, params[stage])]
    return [each for each in found if each.name != TWICE]


def differing(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return (name, a value for each run) of the settings that are not the same in all runs."""
    found = [{each.name: each.value for each in settings_of(record)} for record in records]
    names = dict.fromkeys(name for values in found for name in values)
    rows = [(name, [values.get(name, ABSENT) for values in found]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _of_stage(stage: str, params: Mapping[str, Any]) -> list[Setting]:
    table, worked_out = stage.replace("-", "_"), WORKED_OUT.get(stage, ())
    plain = flattened(keyed(msgspec.convert(REQUIRED.get(stage, {}), TABLES[stage])))
    same_kind = _defaults(stage, params) or plain
    if stage == "train":
        plain["seed"] = same_kind["seed"] = Run().seed
    settings: list[Setting] = []
    for name, value in flattened(params).items():
        if name.partition(".")[0] in worked_out:
            settings.append(Setting(f"{table}.{name}", shown(value), "", changed=False))
            continue
        default = (plain if name.endswith("kind") else same_kind).get(name)
        settings.append(Setting(f"{table}.{name}", shown(value), shown(default), changed=value != default))
    return settings


def _defaults(stage: str, params: Mapping[str, Any]) -> dict[str, object] | None:
    """Return the defaults where choices of a kind are as chosen; None where such a choice has no defaults."""
    chosen = {
        name: {"kind": value["kind"]} for name, value in params.items() if isinstance(value, dict) and "kind" in value
    }
    try:
        return flattened(keyed(msgspec.convert({**REQUIRED.get(stage, {}), **chosen}, TABLES[stage])))
    except msgspec.ValidationError:
        return None


def shown(value: object) -> str:
    """Return a value as a person reads it."""
    match value:
        case None:
            return ABSENT
        case str():
            return value or "none"
        case list() | tuple():
            return ", ".join(map(shown, value)) or "none"
        case dict():
            return ", ".join(f"{name} {shown(each)}" for name, each in value.items()) or "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case _:
            return str(value)
