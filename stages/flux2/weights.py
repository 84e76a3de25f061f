"""Weight files of any layout and spelling, as canonical tensors: resolved strictly, digested, loaded one by one.

`resolve` compares what the files hold with what the model consists of and says everything that is wrong at once. What
it returns only points into the files, so that their tensors are read, converted and hashed without ever being in
memory together.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from schemas.base import UNREADABLE
from schemas.errors import Damaged, Fault
from stages.flux2 import float8, packing
from stages.flux2.names import Component, Piece
from stages.flux2.shapes import Shapes, packed_elsewhere, recognise
from stages.stores.tensors import (
    DTYPES,
    Entry,
    Header,
    OpenTensors,
    Tensor,
    list_digest,
    open_tensors,
    read_header,
    to_mlx,
)

if TYPE_CHECKING:
    import mlx.core as mx

INDEX_SUFFIX = ".index.json"
WEIGHT_DTYPES = ("F32", "BF16", "F16")
# Names a message lists before it only counts.
LISTED = 5
# Reading waits for the disk and hashing leaves the interpreter free.
DIGEST_THREADS = 4


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Assembly:
    """A canonical tensor: its bytes are those of `spans`, one after the other.

    Of 8-bit floats each span is followed by that of the factor its numbers are multiplied with.
    """

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class Layout:
    """Where every canonical tensor of one component lies; `headers` are those the spans were taken from.

    `shapes` are those expected. Of the modules `packed`, whose matrices the files hold quantized, there are scales
    and biases beside the weight, and the weight has another shape.
    """

    tensors: dict[str, Assembly]
    headers: dict[Path, Header]
    shapes: Shapes
    packed: dict[str, packing.Format]

    @property
    def size(self) -> int:
        """Bytes of all canonical tensors."""
        return sum(assembly.size for assembly in self.tensors.values())


@dataclass(frozen=True)
class _Found:
    """A tensor in some file, under its name there."""

    path: Path
    name: str
    entry: Entry


class _Index(msgspec.Struct):
    """The index beside sharded files; what else it says is not used."""

    weight_map: dict[str, str]


def resolve(files: Sequence[Path], expected: Shapes, component: Component) -> Layout:
    """Find every tensor of `expected` in `files`: safetensors files and, where they are shards, their index.

    Raises `Damaged` with every fault found: the index and the files disagree, tensors are missing, of another shape
    or type, or are not part of the model.
    """
    headers = {path: read_header(path) for path in files if not path.name.endswith(INDEX_SUFFIX)}
    for path in files:
        if path.name.endswith(INDEX_SUFFIX):
            _check_index(path, headers)
    found = _gather(headers, component)
    _refuse_packed(headers, found)
    # The spelling under which most of the model is there is the one meant.
    pieces = max(component.spellings, key=lambda spelling: _count_present(spelling, expected, found))
    check = _Check(expected, component, found)
    tensors: dict[str, Assembly] = {}
    for name in expected:
        tensors |= check.assemble(name, pieces(name))
    check.raise_faults(headers)
    return Layout(tensors, headers, expected, check.packed)


def digest(layout: Layout, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return what the tensors are, whatever files and spelling they came from.

    sha256 of each tensor's bytes after conversion, then of the sorted list of (name, type, shape, sha256).
    `on_bytes` is told, as tensors finish, how many bytes more are done.
    """
    rows: list[tuple[str, str, tuple[int, ...], str]] = []
    with _open(layout) as opened, ThreadPoolExecutor(DIGEST_THREADS) as pool:
        hashes = pool.map(lambda assembly: _sha256(opened, assembly), layout.tensors.values())
        for (name, assembly), sha256 in zip(layout.tensors.items(), hashes, strict=True):
            rows.append((name, assembly.dtype, assembly.shape, sha256))
            if on_bytes is not None:
                on_bytes(assembly.size)
    return list_digest(rows)


def load(layout: Layout, dtype: mx.Dtype | None = None) -> Iterator[tuple[str, mx.array]]:
    """Yield each canonical tensor, evaluated, cast to `dtype` if given.

    Convolutions [O, I, kh, kw] become [O, kh, kw, I], as MLX has them.
    """
    with _open(layout) as opened:
        for name, assembly in layout.tensors.items():
            yield name, to_mlx(_in_mlx(_read(opened, assembly)), dtype)


@contextlib.contextmanager
def _open(layout: Layout) -> Iterator[dict[Path, OpenTensors]]:
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(open_tensors(path)) for path in layout.headers}
        for path, file in opened.items():
            if file.header != layout.headers[path]:
                raise Damaged(
                    "weights.changed", "the file was replaced", where=str(path), fix="run the same command again"
                )
        yield opened


def _sha256(opened: Mapping[Path, OpenTensors], assembly: Assembly) -> str:
    sha256 = hashlib.sha256()
    for span in assembly.spans:
        for chunk in opened[span.path].chunks(span.start, span.stop):
            sha256.update(chunk)
    return sha256.hexdigest()


def _read(opened: Mapping[Path, OpenTensors], assembly: Assembly) -> Tensor:
    if assembly.dtype == float8.DTYPE:
        return _multiplied(opened, assembly)
    data = np.empty(assembly.size, np.uint8)
    position = 0
    for span in assembly.spans:
        for chunk in opened[span.path].chunks(span.start, span.stop):
            data[position : position + len(chunk)] = np.frombuffer(chunk, np.uint8)
            position += len(chunk)
    return Tensor(assembly.dtype, data.view(DTYPES[assembly.dtype]).reshape(assembly.shape))


def _multiplied(opened: Mapping[Path, OpenTensors], assembly: Assembly) -> Tensor:
    """Return 8-bit floats as float32."""
    pieces, values = [], float8.values()
    for numbers, factor in zip(assembly.spans[::2], assembly.spans[1::2], strict=True):
        codes = np.frombuffer(opened[numbers.path].read_bytes(numbers.start, numbers.stop), np.uint8)
        (scale,) = np.frombuffer(opened[factor.path].read_bytes(factor.start, factor.stop), DTYPES["F32"])
        pieces.append((values * scale)[codes])
    return Tensor("F32", np.concatenate(pieces).reshape(assembly.shape))


def _in_mlx(tensor: Tensor) -> Tensor:
    return Tensor(tensor.dtype, tensor.data.transpose(0, 2, 3, 1)) if len(tensor.shape) == 4 else tensor


def _check_index(path: Path, headers: Mapping[Path, Header]) -> None:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (OSError, *UNREADABLE) as error:
        raise Damaged(
            "weights.index", "cannot read the index", where=str(path), why=str(error), fix="download the model again"
        ) from error
    listed = set(index.weight_map.items())
    held = {(name, file.name) for file, header in headers.items() for name in header.entries}
    if listed != held:
        raise Damaged(
            "weights.index",
            "the index and the files beside it disagree",
            where=str(path),
            why=f"only in the index: {_few(name for name, _ in listed - held)}; "
            f"only in the files: {_few(name for name, _ in held - listed)}",
            fix="download the model again",
        )


def _gather(headers: Mapping[Path, Header], component: Component) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for path, header in headers.items():
        for name, entry in header.entries.items():
            plain = component.plain(name)
            if plain in found:
                raise Damaged(
                    "weights.twice",
                    f"tensor {plain} is there twice",
                    where=str(path),
                    why=f"also in {found[plain].path}",
                    fix="keep only the files of one model in the folder",
                )
            found[plain] = _Found(path, name, entry)
    return found


def _refuse_packed(headers: Mapping[Path, Header], found: Mapping[str, _Found]) -> None:
    read = float8.readable({name: one.entry for name, one in found.items()})
    words = packed_elsewhere({name: one.entry.dtype for name, one in found.items() if name not in read})
    if words is not None:
        raise Damaged(
            "weights.packed_elsewhere",
            f"the weights are {words}",
            where=str(next(iter(headers))),
            why=f"found {recognise({name: one.entry.shape for name, one in found.items()})}, "
            f"expected {', '.join(WEIGHT_DTYPES)} or what MLX packs",
            fix="use the file with the full weights (bf16): the settings of quantize pack what is loaded",
        )


def _count_present(pieces: Callable[[str], tuple[Piece, ...]], expected: Shapes, found: Mapping[str, _Found]) -> int:
    return sum(piece.name in found for name in expected for piece in pieces(name))


class _Check:
    """Compares what was found with what is expected, and remembers every difference."""

    def __init__(self, expected: Shapes, component: Component, found: Mapping[str, _Found]) -> None:
        self._expected = expected
        self._unused = component.unused
        self._found = found
        self._used: set[str] = set()
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self._mistyped: list[str] = []
        self._unreadable: list[str] = []
        self.packed: dict[str, packing.Format] = {}

    def assemble(self, name: str, pieces: tuple[Piece, ...]) -> dict[str, Assembly]:
        """Return the canonical tensor made of `pieces`, and those it is unpacked with where files hold it packed.

        Nothing after noting that a piece is missing.
        """
        entries = self._entries(pieces)
        if len(entries) < len(pieces):
            return {}
        shape = self._expected[name]
        if {entry.dtype for entry in entries} == {float8.DTYPE}:
            return {name: self._multiplied(name, pieces)}
        if {entry.dtype for entry in entries} != {packing.WORDS}:
            return {name: self._assembled(name, (shape, WEIGHT_DTYPES), pieces)}
        form = self._form(shape, pieces, entries)
        if form is None:
            self._unreadable.append(name)
            return {}
        module = name.removesuffix(".weight")
        self.packed[module] = form
        return {
            f"{module}.{part}": self._assembled(f"{module}.{part}", expected, _beside(pieces, part))
            for part, expected in form.tensors(shape).items()
        }

    def _multiplied(self, name: str, pieces: tuple[Piece, ...]) -> Assembly:
        """Return a matrix of 8-bit floats, each piece followed by its factor."""
        assembly = self._assembled(name, (self._expected[name], (float8.DTYPE,)), pieces)
        entries = {each: one.entry for each, one in self._found.items()}
        spans: list[Span] = []
        for piece, span in zip(pieces, assembly.spans, strict=True):
            factor = float8.factor_of(piece.name, entries)
            assert factor is not None  # else `_refuse_packed` has raised
            spans += [span, _span(self._found[factor], Piece(factor))]
            self._used |= {float8.MARKER, *float8.beside(piece.name)}
        return replace(assembly, spans=tuple(spans))

    def _entries(self, pieces: tuple[Piece, ...]) -> list[Entry]:
        """Return the entries of the pieces that are there; note the missing."""
        self._used |= {piece.name for piece in pieces}
        self._missing += [piece.name for piece in pieces if piece.name not in self._found]
        return [self._found[piece.name].entry for piece in pieces if piece.name in self._found]

    def _form(self, shape: tuple[int, ...], pieces: tuple[Piece, ...], entries: list[Entry]) -> packing.Format | None:
        """Return how a packed matrix is held; None where what lies beside it does not make it one."""
        beside = [_beside(pieces, part) for part in ("scales", "biases")]
        self._used |= {piece.name for each in beside for piece in each}
        scales, biases = (
            [self._found[piece.name].entry for piece in each if piece.name in self._found] for each in beside
        )
        matrices = all(len(each) == 2 for each in (shape, *(entry.shape for entry in (*entries, *scales))))
        if not matrices or len(scales) != len(pieces) or len(biases) not in (0, len(pieces)):
            return None
        forms = {
            packing.recognise(shape[1], entry.shape[1], (scale.dtype, scale.shape[1]), biases=bool(biases))
            for entry, scale in zip(entries, scales, strict=True)
        }
        return forms.pop() if len(forms) == 1 else None

    def _assembled(
        self, name: str, expected: tuple[tuple[int, ...], tuple[str, ...]], pieces: tuple[Piece, ...]
    ) -> Assembly:
        """Return a tensor made of pieces that are there, after noting what is not `expected`: shape and types."""
        shape, types = expected
        entries = self._entries(pieces)
        for piece, entry in zip(pieces, entries, strict=True):
            whole = (shape[0] // len(pieces) * piece.of, *shape[1:])
            if not _same_matrix(entry.shape, whole):
                self._misshapen.append(f"{piece.name} {list(entry.shape)} instead of {list(whole)}")
        found = {entry.dtype for entry in entries}
        if len(found) > 1 or not found <= set(types):
            self._mistyped.append(f"{name} {' and '.join(sorted(found))}")
        return Assembly(entries[0].dtype, shape, tuple(_span(self._found[piece.name], piece) for piece in pieces))

    def raise_faults(self, headers: Mapping[Path, Header]) -> None:
        """Raise one `Damaged` that lists all differences, if there are any."""
        extra = [name for name in self._found if name not in self._used and not self._unused(name)]
        kinds = (
            ("missing", self._missing, "missing"),
            ("shape", self._misshapen, "of another shape"),
            ("extra", extra, "not part of the model"),
            ("dtype", self._mistyped, f"not of one type out of {', '.join(WEIGHT_DTYPES)}"),
            (
                "packed",
                self._unreadable,
                "packed otherwise than MLX packs matrices, with scales and biases beside them",
            ),
        )
        looks = recognise({name: one.entry.shape for name, one in self._found.items()})
        faults = [
            Fault(
                code=f"weights.{code}",
                what=f"{len(names)} tensors are {words}",
                where=", ".join(str(path) for path in list(headers)[:2]) + (", ..." if len(headers) > 2 else ""),
                why=f"expected {recognise(self._expected)}, found {looks}; {_few(names)}",
                fix="point model.source, or the path of this part in [model], to the right file, "
                "or download it again",
            )
            for code, names, words in kinds
            if names
        ]
        if faults:
            raise Damaged.of(faults)


def _same_matrix(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    # A 1x1 convolution [C, C, 1, 1] is the matrix [C, C]: the autoencoder's attention is written both ways.
    return found == expected or (len(expected) == 2 and found == (*expected, 1, 1))


def _beside(pieces: tuple[Piece, ...], part: str) -> tuple[Piece, ...]:
    """Return the pieces of what a packed matrix is unpacked with."""
    return tuple(replace(piece, name=f"{piece.name.removesuffix('weight')}{part}") for piece in pieces)


def _span(found: _Found, piece: Piece) -> Span:
    size = (found.entry.stop - found.entry.start) // piece.of
    start = found.entry.start + piece.index * size
    return Span(found.path, start, start + size)


def _few(names: Iterator[str] | list[str]) -> str:
    ordered = sorted(set(names))
    rest = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return (", ".join(ordered[:LISTED]) or "nothing") + rest
