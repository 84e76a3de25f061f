"""Reading a pipeline's TOML and `--set` into a `Config`, strictly: every unknown name and wrong value is an error."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from schemas.errors import BadConfig, Fault
from schemas.run import Config

MAX_BYTES = 256 * 1024
# A key of thousands of dotted parts takes tomllib seconds and gigabytes.
DEEP_KEY = re.compile(rb"(?:[\w\"'-]+[ \t]*\.[ \t]*){16}")
MAX_DEPTH = 16


def load_config(path: Path, assignments: Sequence[str] = ()) -> Config:
    """Return the configuration in `path` with `--set` assignments (`a.b=c`) applied.

    Raises BadConfig listing every unknown name, or the first wrong type or value.
    """
    return _convert(_assign(_parse(path), assignments), str(path))


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadConfig("config.absent", "no such configuration file", where=str(path), fix="name a .toml file")
    if path.stat().st_size > MAX_BYTES:
        raise BadConfig(
            "config.too_large",
            "the configuration file is too large",
            where=str(path),
            why=f"at most {MAX_BYTES} bytes, found {path.stat().st_size}",
            fix="name a pipeline's .toml file",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadConfig(
            "config.unreadable", "cannot read", where=str(path), why=error.strerror or "", fix="check its permissions"
        ) from error
    return _toml(data, str(path))


def _toml(data: bytes, where: str) -> dict[str, Any]:
    try:
        if DEEP_KEY.search(data):
            raise BadConfig(
                "config.too_deep", "a key has too many dotted parts", where=where, fix="use the names of the README"
            )
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(
            "config.not_toml", "not a TOML file", where=where, why=str(error), fix="correct that line"
        ) from error
    except RecursionError as error:
        raise BadConfig(
            "config.too_deep", "nested too deeply", where=where, fix="use plain tables and lists"
        ) from error


def _assign(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            raise BadConfig(
                "config.bad_set", "not an assignment", where=f"--set {assignment}", fix="write --set table.name=value"
            )
        table: dict[str, Any] = data
        for part in parts[:-1]:
            inner: Any = table.setdefault(part, {})
            if isinstance(inner, dict):
                table = cast("dict[str, Any]", inner)
            else:
                raise BadConfig(
                    "config.bad_set", f"{part} is not a table", where=f"--set {assignment}", fix="name one field"
                )
        table[parts[-1]] = _value(text)
    return data


def _value(text: str) -> object:
    """A TOML value where it parses as one, else the text itself (a string field takes it literally)."""
    try:
        parsed = tomllib.loads(f"value = {text}\n")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _convert(data: dict[str, Any], where: str) -> Config:
    if faults := list(_faults(data, Config, "", where)):
        raise BadConfig.of(faults)
    try:
        return msgspec.convert(data, Config, strict=True)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at ")
        field = at.strip("`$.") or "the file"
        raise BadConfig(
            "config.wrong_value", f"{field} is wrong", where=where, why=message, fix=f"correct {field}"
        ) from error


def _faults(data: Mapping[str, Any], kind: type, prefix: str, where: str) -> Iterator[Fault]:
    """Yield a fault for every unknown name, unknown kind and non-finite number below `data`."""
    hints = get_type_hints(kind)
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        if name not in hints:
            if name != kind.__struct_config__.tag_field:  # type: ignore[attr-defined]
                yield _unknown("config.unknown_key", "unknown setting", dotted, prefix, list(hints), where)
        elif isinstance(value, float) and not math.isfinite(value):
            yield Fault(
                code="config.not_finite",
                what=f"{dotted} is not a finite number",
                where=where,
                fix=f"correct {dotted}",
            )
        elif isinstance(value, dict):
            yield from _table_faults(cast("dict[str, Any]", value), hints[name], dotted, where)


def _table_faults(value: Mapping[str, Any], hint: Any, dotted: str, where: str) -> Iterator[Fault]:
    structs = [each for each in _members(hint) if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    tags = {str(each.__struct_config__.tag): each for each in structs if each.__struct_config__.tag is not None}
    chosen = tags.get(str(value.get("kind"))) if "kind" in value else None
    if tags and "kind" in value and chosen is None:
        yield _unknown(
            "config.unknown_kind", f"unknown kind for {dotted}:", str(value["kind"]), "", list(tags), where
        )
    elif chosen or len(structs) == 1:
        yield from _faults(value, chosen or structs[0], f"{dotted}.", where)
    elif tags:
        fix = f"add kind = one of {', '.join(tags)}"
        yield Fault(code="config.no_kind", what=f"{dotted} does not say which kind", where=where, fix=fix)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def _unknown(code: str, what: str, found: str, prefix: str, valid: list[str], where: str) -> Fault:
    names = [f"{prefix}{name}" for name in valid]
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"valid: {', '.join(names)}"
    return Fault(
        code=code, what=f"{what} {found}", where=where, why=f"valid: {', '.join(names)}" if near else "", fix=fix
    )
