"""Reading a pipeline's TOML and `--set` into a `Config`, strictly: every unknown name and wrong value is an error."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import msgspec

from schemas.base import Strict
from schemas.errors import BadConfig, Fault
from schemas.run import Config

MAX_BYTES = 256 * 1024
MAX_PARTS = 16
# A key of thousands of dotted parts takes tomllib seconds and gigabytes. A key begins a line, a table's name or an
# entry of an inline table; possessive, so that a long line is looked at once.
DEEP_KEY = re.compile(
    r"""(?:^|[\[{,])[ \t]*+(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){256}""", re.M
)

Where = Callable[[str], str]
Settings = TypeVar("Settings", bound=Strict)


def load_config(path: Path, assignments: Sequence[str] = ()) -> Config:
    """Return the configuration of a pipeline. Raises BadConfig as `load_settings` does."""
    return load_settings(Config, path, assignments)


def load_settings(kind: type[Settings], path: Path, assignments: Sequence[str] = ()) -> Settings:
    """Return the settings in `path` with `--set` assignments (`a.b=c`) applied.

    Raises BadConfig listing every unknown name, wrong type, value out of range and missing setting.
    """
    names = {each.partition("=")[0].strip(): f"--set {_clip(each)}" for each in assignments}

    def where(dotted: str) -> str:
        """Where the setting of that name, or the table around it, was given."""
        inside = (
            each
            for name, each in names.items()
            if f"{dotted}.".startswith(f"{name}.") or name.startswith(f"{dotted}.")
        )
        return next(inside, str(path))

    return _convert(kind, _with_kinds(_assign(_parse(path), assignments), kind), where, str(path))


def located(name: str, base: Path) -> Path:
    """Return where a path of a configuration in the folder `base` leads; a `~` in front is the home folder.

    Of nobody known it is a plain name.
    """
    try:
        # A Path forgets the `./` of one who means a folder of that name.
        return base / (Path(name).expanduser() if name.startswith("~") else name)
    except RuntimeError:
        return base / name


def run_name(path: Path) -> str:
    """Return the run that a file stands for: its stem with everything but letters, digits and dashes as a dash."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:64] or "lora"


def is_folder(path: Path) -> bool:
    """Return whether a folder lies there; a name too long for the file system names none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _parse(path: Path) -> dict[str, Any]:
    where = str(path)
    try:
        if not path.is_file():
            what = "the configuration is not a file" if path.exists() else "no such configuration file"
            raise BadConfig("config.absent", what, where=where, fix="name a .toml file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadConfig(
            "config.unreadable",
            "cannot read",
            where=where,
            why=error.strerror or "",
            fix="check its name and permissions",
        ) from error
    if len(data) > MAX_BYTES:
        raise BadConfig(
            "config.too_large",
            "the configuration file is too large",
            where=where,
            why=f"at most {MAX_BYTES} bytes, found {path.stat().st_size}",
            fix="name a pipeline's .toml file",
        )
    try:
        return _toml(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        line, found = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise BadConfig(
            "config.not_utf8",
            "not UTF-8 text",
            where=where,
            why=f"a byte {found:#04x} in line {line}",
            fix="save it as plain UTF-8",
        ) from error
    except ValueError as error:  # not TOML, or a number of more digits than Python reads
        raise BadConfig(
            "config.not_toml", "not a TOML file", where=where, why=str(error), fix="correct that line"
        ) from error


def _toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML of bounded depth. Raises TOMLDecodeError."""
    try:
        if not DEEP_KEY.search(text):
            return tomllib.loads(text)
    except RecursionError:
        pass
    raise BadConfig("config.too_deep", "nested too deeply", where=where, fix="use plain tables and lists")


def _assign(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts) or len(parts) > MAX_PARTS:
            raise BadConfig(
                "config.bad_set",
                "not an assignment",
                where=f"--set {_clip(assignment)}",
                fix="write --set table.name=value",
            )
        table: dict[str, Any] = data
        for part in parts[:-1]:
            inner: Any = table.setdefault(part, {})
            if isinstance(inner, dict):
                table = cast("dict[str, Any]", inner)
            else:
                raise BadConfig(
                    "config.bad_set",
                    f"{part} is not a table",
                    where=f"--set {_clip(assignment)}",
                    fix="name one field",
                )
        table[parts[-1]] = _value(text, f"--set {_clip(assignment)}")
    return data


def _value(text: str, where: str) -> object:
    """A TOML value where it parses as one, else the text itself (a string field takes it literally)."""
    try:
        parsed = _toml(f"value = {text}\n", where)
    except ValueError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _with_kinds(data: Mapping[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Give a table that does not say its kind that of the setting's default: `--set` then reaches every field."""
    complete = dict(data)
    for field in msgspec.structs.fields(kind):
        value, struct = data.get(field.encode_name), field.type
        if not isinstance(value, dict):
            continue
        table = cast("dict[str, Any]", value)
        if isinstance(field.default, msgspec.Struct):
            struct = type(field.default)
            config = struct.__struct_config__
            table = table if config.tag_field is None else {config.tag_field: config.tag, **table}
        if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
            complete[field.encode_name] = _with_kinds(table, struct)
    return complete


def _convert(kind: type[Settings], data: dict[str, Any], where: Where, path: str) -> Settings:
    if faults := list(_table_faults(data, kind, "", where)):
        raise BadConfig.of(faults)
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        # What only a whole table can say: each of its values is right by itself.
        message, at = _message(error)
        name = at.strip(".") or "the file"
        raise BadConfig(
            "config.wrong_value", f"{name} is wrong", where=path, why=message, fix=f"correct {name}"
        ) from error


def _table_faults(data: Mapping[str, Any], kind: type[msgspec.Struct], prefix: str, where: Where) -> Iterator[Fault]:
    """Yield a fault for every unknown name, wrong value and missing setting below `data`."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, value in data.items():
        if name in fields:
            yield from _faults(value, fields[name].type, f"{prefix}{name}", where)
        elif name != kind.__struct_config__.tag_field:
            valid = [f"{prefix}{each}" for each in fields]
            yield _unknown(
                "config.unknown_key", "unknown setting", f"{prefix}{name}", valid, where(f"{prefix}{name}")
            )
    for name, field in fields.items():
        if field.required and name not in data:
            fix = f"add {name} to [{prefix[:-1]}]" if prefix else f"add a table [{name}]"
            yield Fault(code="config.missing", what=f"{prefix}{name} is missing", where=where(prefix[:-1]), fix=fix)


def _faults(value: object, hint: Any, dotted: str, where: Where) -> Iterator[Fault]:
    structs = [each for each in _members(hint) if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    if structs and isinstance(value, dict):
        yield from _choice_faults(cast("dict[str, Any]", value), structs, dotted, where)
    elif isinstance(value, float) and not math.isfinite(value):
        what = f"{dotted} is not a finite number"
        yield Fault(code="config.not_finite", what=what, where=where(dotted), fix=f"correct {dotted}")
    else:
        try:
            msgspec.convert(value, hint, strict=True)
        except msgspec.ValidationError as error:
            message, at = _message(error)
            yield Fault(
                code="config.wrong_value",
                what=f"{dotted}{at} is wrong",
                where=where(dotted),
                why=f"{message}, found {_clip(repr(value))}",
                fix=f"correct {dotted}",
            )


def _choice_faults(
    table: dict[str, Any], structs: list[type[msgspec.Struct]], dotted: str, where: Where
) -> Iterator[Fault]:
    """Yield the faults of a table that is one of `structs`, told apart by their tags where there are several."""
    tag_field = structs[0].__struct_config__.tag_field or ""
    kinds = {str(each.__struct_config__.tag): each for each in structs}
    found = table.get(tag_field, next(iter(kinds)) if len(kinds) == 1 else None)
    if isinstance(found, str) and found in kinds:
        yield from _table_faults(table, kinds[found], f"{dotted}.", where)
    elif found is None:
        fix = f"add {tag_field} = one of {', '.join(kinds)}"
        yield Fault(code="config.no_kind", what=f"{dotted} does not say which kind", where=where(dotted), fix=fix)
    else:
        yield _unknown("config.unknown_kind", f"unknown kind for {dotted}:", str(found), list(kinds), where(dotted))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def _message(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return what msgspec found wrong, and where below the value it looked at."""
    message, _, at = str(error).partition(" - at ")
    return message.replace("`", ""), at.strip("`").removeprefix("$")


def _clip(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(code: str, what: str, found: str, valid: list[str], where: str) -> Fault:
    names = {each.rpartition(".")[2]: each for each in valid}
    near = difflib.get_close_matches(found.rpartition(".")[2], names, n=1, cutoff=0.5)
    listed = f"valid: {', '.join(valid)}"
    fix = f"did you mean {names[near[0]]}?" if near else listed
    return Fault(code=code, what=f"{what} {_clip(found)}", where=where, why=listed if near else "", fix=fix)
