"""Parquet tables: written deterministically, read only when every page, value and the whole content checks out.

Tables of other people (captions in a `metadata.parquet`) carry no seal and are read with limits instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import GIVEN, RejectedInput, StageError
from schemas.tables import Column, Table
from stages.contract.publish import no_resources
from stages.stores.blame import Blame
from stages.stores.seals import open_sealed, seal

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ROWS = 1 << 20
# Of other people's tables: a few hundred kilobytes of Parquet can expand to gigabytes.
MOST_TEXT_BYTES = 1 << 26
TEXT_BATCH_ROWS = 64

Row = dict[str, Any]


def arrow_schema(table: Table) -> pa.Schema:
    """Return the table's columns as Arrow names them, none of them nullable."""
    import pyarrow as pa

    types: dict[Column, pa.DataType] = {
        "string": pa.string(),
        "int32": pa.int32(),
        "bool": pa.bool_(),
        "box": pa.list_(pa.field("element", pa.int32(), nullable=False), 4),
        "large_binary": pa.large_binary(),
    }
    return pa.schema([pa.field(name, types[kind], nullable=False) for name, kind in table.columns.items()])


def write_table(path: Path, table: Table, rows: Sequence[Row]) -> None:
    """Write `rows` to `path`, the same bytes for the same rows. Durable once it is published.

    Raises ValueError when a row has other columns, a value of another type, or repeats the table's unique columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = list(table.columns)
    if any(row.keys() != table.columns.keys() for row in rows):
        raise ValueError(f"rows of {table.name} have the columns {', '.join(names)}")
    if repeated := _repeated(rows, table.unique):
        raise ValueError(f"two rows of {table.name} with the same {' and '.join(table.unique)}: {repeated}")
    schema = arrow_schema(table)
    columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in names]
    # Uncompressed: the same bytes whatever compressor a machine has, and a size that cannot explode on reading.
    with (
        no_resources(path),
        path.open("wb") as file,
        parquet.ParquetWriter(file, schema, compression="none", write_page_checksum=True) as writer,
    ):
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    seal(path)


def read_table(path: Path, table: Table) -> list[Row]:
    """Return the rows of `path` with the columns of `table`; the file may have more columns.

    Raises Damaged when the file is absent, was not written by `write_table`, or differs in any way that matters.
    """
    from pyarrow import parquet

    blame = Blame("table", str(path), f"flux2-lora {table.stage} {GIVEN} --force")
    sealed = open_sealed(path, blame)
    for group in range(len(sealed.groups)):
        sealed.check_group(group, blame)
    with damage_as(partial(blame.error, "damaged", "the table cannot be read")):
        with parquet.ParquetFile(path, metadata=sealed.metadata(), page_checksum_verification=True) as file:
            _check_columns(table, file.schema_arrow, blame)
            if file.metadata.num_rows > MOST_ROWS:
                raise blame.error("too_long", "the table has too many rows", f"{file.metadata.num_rows} rows")
            stored = file.read(columns=list(table.columns), use_threads=False)
        stored.validate(full=True)
        names, columns = stored.column_names, [column.to_pylist() for column in stored.columns]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    if repeated := _repeated(rows, table.unique):
        raise blame.error("repeated", "two rows for the same thing", str(repeated))
    return rows


def read_texts(data: bytes, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of somebody else's table, of `columns` those that hold text; an empty cell is left out.

    Raises RejectedInput when it is no Parquet table, not UTF-8, or expands beyond the limits. A table that lies about
    its sizes can take any amount of memory first: stages/dataset/reading.py bounds that.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows: list[dict[str, str]] = []
    rejected = partial(_rejected, "unreadable", "not a Parquet table that can be read")
    size = 0
    with damage_as(rejected), parquet.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise _rejected("too_long", "the table has too many rows", f"at most {MOST_ROWS}")
        schema = file.schema_arrow
        if twice := [name for name in columns if schema.names.count(name) > 1]:
            raise _rejected("columns", "a column comes twice", ", ".join(twice))
        texts = [name for name in columns if name in schema.names and _is_text(schema.field(name).type)]
        for batch in file.iter_batches(TEXT_BATCH_ROWS, columns=texts, use_threads=False):
            if (size := size + batch.nbytes) > MOST_TEXT_BYTES:
                raise _rejected("too_large", "the table is too large", f"at most {MOST_TEXT_BYTES} bytes of text")
            batch.validate(full=True)
            rows += [{name: text for name, text in row.items() if text is not None} for row in batch.to_pylist()]
    return rows


@contextlib.contextmanager
def damage_as(error: Callable[[str], StageError]) -> Iterator[None]:
    """Raise `error(reason)` for whatever Arrow makes of damaged bytes."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, EOFError) as cause:
        raise error(str(cause).partition("\n")[0]) from cause


def _check_columns(table: Table, found: pa.Schema, blame: Blame) -> None:
    for field in arrow_schema(table):
        at = found.get_field_index(field.name)
        if at < 0 or not found.field(at).equals(field):
            why = f"expected {field}, found {found.field(at) if at >= 0 else 'none'}"
            raise blame.error("columns", f"column {field.name} is not as expected", why)


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _repeated(rows: Sequence[Row], unique: tuple[str, ...]) -> tuple[object, ...] | None:
    seen: set[tuple[object, ...]] = set()
    for key in (tuple(row[name] for name in unique) for row in rows if unique):
        if key in seen:
            return key
        seen.add(key)
    return None


def _rejected(code: str, what: str, why: str) -> RejectedInput:
    fix = "write it as metadata.jsonl with the fields file_name and text"
    return RejectedInput(f"table.{code}", what, why=why, fix=fix)
