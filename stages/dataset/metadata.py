"""Caption tables: `metadata.jsonl`, `metadata.csv` and `metadata.parquet` (or `captions.*`), one row per picture.

A row names its picture in `file_name`, relative to the table's folder, and carries its caption in one of `text`,
`caption` or `prompt`, in JSON also a list of captions; other columns are left alone. Every bad row is a fault of its
own.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from schemas.base import UNREADABLE
from schemas.errors import Fault, RejectedInput
from stages.dataset.reading import texts_of

PICTURE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")
MAX_TABLE_BYTES = 256 << 20
MAX_LINE_BYTES = 1 << 20


class Line(msgspec.Struct):
    """One line of a JSON table, or a JSON sidecar without `file_name`; columns it does not name are ignored."""

    file_name: str | None = None
    text: str | tuple[str, ...] | None = None
    caption: str | tuple[str, ...] | None = None
    prompt: str | tuple[str, ...] | None = None

    def captions(self) -> dict[str, tuple[str, ...]]:
        """Return the caption columns that are present."""
        columns = zip(CAPTION_COLUMNS, (self.text, self.caption, self.prompt), strict=True)
        return {
            column: (value,) if isinstance(value, str) else value for column, value in columns if value is not None
        }


@dataclass(frozen=True)
class Row:
    """A picture's name as the table spells it and its captions as they stand there."""

    where: str
    file_name: str
    texts: tuple[str, ...]


def read_rows(path: Path, where: str) -> Iterator[Row | Fault]:
    """Yield each row of the table at `path`, or the fault it has; `where` is the table's name in the dataset."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        yield _fault(
            where, "table.unreadable", "cannot read the table", str(error.strerror), "make the file readable"
        )
        return
    if len(data) > MAX_TABLE_BYTES:
        yield _fault(where, "table.too_large", "the table is too large", f"expected at most {MAX_TABLE_BYTES} bytes")
        return
    match path.suffix.lower():
        case ".jsonl":
            yield from _json_rows(data, where)
        case ".csv":
            yield from _csv_rows(data, where)
        case _:
            yield from _parquet_rows(data, where)


def decode_line(data: bytes, where: str) -> Line:
    """Decode one JSON object. Raises RejectedInput when it is not one, or not UTF-8."""
    try:
        return msgspec.json.decode(data, type=Line)
    except UNREADABLE as error:
        raise RejectedInput(
            "table.not_json",
            "not a JSON object with text fields",
            where=where,
            why=str(error),
            fix=f'write {{"{PICTURE_COLUMN}": "1.png", "text": "..."}}',
        ) from error


def _json_rows(data: bytes, where: str) -> Iterator[Row | Fault]:
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        here = f"{where} line {number}"
        if not raw.strip():
            continue
        if len(raw) > MAX_LINE_BYTES:
            yield _fault(here, "caption.too_long", "the line is too long", f"expected at most {MAX_LINE_BYTES} bytes")
            continue
        try:
            line = decode_line(raw, here)
        except RejectedInput as error:
            yield error.faults[0]
            continue
        yield _row(here, line.file_name, line.captions())


def _csv_rows(data: bytes, where: str) -> Iterator[Row | Fault]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _fault(where, "caption.not_utf8", "the table is not UTF-8", f"byte {error.start} cannot be decoded")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        filled = filter(None, reader)
        header = next(filled, [])
        if (fault := _header_fault(f"{where} line {max(reader.line_num, 1)}", header)) is not None:
            yield fault
            return
        for cells in filled:
            here = f"{where} line {reader.line_num}"
            if len(cells) != len(header):
                why = f"expected {len(header)}, found {len(cells)}"
                yield _fault(here, "table.columns", "wrong number of columns", why)
                continue
            named = dict(zip(header, cells, strict=True))
            present = {column: (named[column],) for column in CAPTION_COLUMNS if column in named}
            yield _row(here, named[PICTURE_COLUMN], present)
    except csv.Error as error:
        yield _fault(f"{where} line {reader.line_num}", "table.not_csv", "not valid CSV", str(error))


def _parquet_rows(data: bytes, where: str) -> Iterator[Row | Fault]:
    rows = texts_of(data, (PICTURE_COLUMN, *CAPTION_COLUMNS))
    if isinstance(rows, Fault):
        yield msgspec.structs.replace(rows, where=where)
        return
    for number, cells in enumerate(rows, 1):
        named = cells.pop(PICTURE_COLUMN, None)
        yield _row(f"{where} row {number}", named, {column: (text,) for column, text in cells.items()})


def _row(where: str, file_name: str | None, captions: Mapping[str, tuple[str, ...]]) -> Row | Fault:
    if not file_name:
        return _fault(where, "table.columns", "the row names no picture", f"expected {PICTURE_COLUMN}")
    if len(captions) != 1:
        found = ", ".join(captions) or "none"
        return _fault(where, "table.columns", "expected one of text, caption, prompt", f"found {found}")
    return Row(where, file_name, next(iter(captions.values())))


def _header_fault(where: str, header: Sequence[str]) -> Fault | None:
    why = f"found {', '.join(header) or 'none'}"
    if PICTURE_COLUMN not in header or not set(CAPTION_COLUMNS) & set(header):
        why = f"expected {PICTURE_COLUMN} and one of {', '.join(CAPTION_COLUMNS)}, {why}"
        return _fault(where, "table.columns", "columns are missing", why)
    if any(header.count(name) > 1 for name in (PICTURE_COLUMN, *CAPTION_COLUMNS)):
        return _fault(where, "table.columns", "a column comes twice", why)
    return None


def _fault(where: str, code: str, what: str, why: str, fix: str = "correct the table, or remove it") -> Fault:
    return Fault(code=code, what=what, where=where, why=why, fix=fix)
