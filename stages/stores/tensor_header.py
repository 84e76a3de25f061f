"""The header of a safetensors file: parsed, and believed only if it accounts for every byte.

Common readers accept overlapping tensors, duplicate names and bytes after the end; here each lie is an error that
says what was expected and what was found.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from schemas.errors import Damaged

# Published headers are a few hundred kB; parsing one made to hurt takes 15 times its bytes and 0.1 s a MB.
MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 512
METADATA = "__metadata__"

# The format's tag of each type -> how numpy holds it.
DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
# What else is met under the name of a safetensors file: its first bytes, what it is, and what to do.
OTHER_FILES = (
    (b"version ", "a Git LFS pointer: git brought no more than its name", "fetch the file itself (git lfs pull)"),
    (b"<", "a web page", "download it again: the page may ask to log in or to accept a licence"),
    (b"{", "a text, perhaps an answer in place of the file", "look into it, and download the file again"),
    (b"GGUF", "a GGUF file", "use the .safetensors file in bfloat16; model.quantize packs what is loaded"),
    (b"PK\x03\x04", "a pickle in a zip, as torch.save writes it", "use a .safetensors file; pickles are never read"),
    (b"\x80\x02", "a pickle", "use a .safetensors file; pickles are never read"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: `start` and `stop` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A validated header: its entries tile the file from the header's end to `size`, in bytes."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    size: int


def parse(path: Path, head: bytes, size: int) -> Header:
    """Return the header whose length field and JSON text are `head`, of a file of `size` bytes. Raises `Damaged`."""
    fields = _parse_json(path, head[8:])
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        damaged("metadata", "the header's metadata is not a table of strings", path)
    entries = {name: _entry(path, name, value, len(head)) for name, value in fields.items()}
    expected = len(head)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != expected:
            kind = "overlap" if entry.start < expected else "hole"
            damaged(
                kind,
                f"tensor {name} does not start where the one before ends",
                path,
                why=f"expected byte {expected}, found {entry.start}",
            )
        expected = entry.stop
    if expected > size:
        damaged("truncated", "the file ends early", path, why=f"expected {expected} bytes, found {size}")
    if expected < size:
        damaged("trailing", "bytes follow the last tensor", path, why=f"expected {expected} bytes, found {size}")
    return Header(metadata, entries, size)


def refuse_other_files(path: Path, start: bytes) -> None:
    """Raise `Damaged` in words for a file that is plainly something else, by its first 8 bytes.

    None of these starts like a length that a header may have.
    """
    for magic, words, fix in OTHER_FILES:
        if start.startswith(magic):
            damaged("other", f"this is {words}, not a safetensors file", path, fix)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        damaged("header", "not a safetensors header", path, why="expected a JSON object")
    try:
        fields = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_float=_no_number, parse_constant=_no_number
        )
        "".join(fields).encode("utf-8")  # raises on lone surrogates
    except (ValueError, RecursionError) as error:
        damaged("header", "not a safetensors header", path, why=str(error)[:200])
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not an integer")


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        damaged(
            "name",
            f"a tensor's name is not 1 to {MAX_NAME_CHARACTERS} printable characters",
            path,
            why=f"found {name[:80]!r}, {len(name)} characters",
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        damaged("entry", f"the entry of tensor {name} is not dtype, shape and data_offsets", path)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        damaged(
            "dtype",
            f"tensor {name} has an unknown type",
            path,
            why=f"expected one of {', '.join(DTYPES)}, found {str(dtype)[:40]}",
        )
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or _endless(shape):
        damaged("shape", f"tensor {name} has an impossible shape", path, why=f"found {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        damaged("offsets", f"tensor {name} has impossible offsets", path, why=f"found {str(offsets)[:80]}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        damaged(
            "length",
            f"tensor {name} has another length than its shape and type",
            path,
            why=f"expected {expected} bytes for {dtype} {shape}, found {offsets[1] - offsets[0]}",
        )
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    # Not isinstance: true and false are ints to it.
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def _endless(shape: list[int]) -> bool:
    """Whether a tensor without numbers has dimensions that nothing can hold: its length does not give them away."""
    return 0 in shape and math.prod(size for size in shape if size) >= 1 << 31


def damaged(
    code: str, what: str, path: Path, fix: str = "restore the file or make it again", *, why: str = ""
) -> NoReturn:
    """Raise the `Damaged` of a tensor file."""
    raise Damaged(f"tensors.{code}", what, where=str(path), why=why, fix=fix)
