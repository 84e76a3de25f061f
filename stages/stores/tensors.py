"""Safetensors files, read strictly and written deterministically.

A header is believed only after every byte of the file is accounted for, because common readers accept overlapping,
truncated or renamed tensors. Tensors are numpy arrays; bfloat16 and the 8-bit floats, which numpy lacks, are held as
their bits. The format has no checksum of its own: `load` takes the expected sha256, `tensor_digest` is what the
tensors are whatever file holds them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.errors import Damaged, NoResources
from stages.contract.digests import digest_of
from stages.contract.publish import no_resources, sync
from stages.stores.tensor_header import (
    DTYPES,
    MAX_HEADER_BYTES,
    METADATA,
    Entry,
    Header,
    damaged,
    parse,
    refuse_other_files,
)

if TYPE_CHECKING:
    import mlx.core as mx

SUFFIX = ".safetensors"
CHUNK_BYTES = 1 << 22
TENSOR_DIGEST = "tensor_digest"
# What MLX can hold without changing a value: no 64-bit and no 8-bit floats.
MLX_DTYPES = {
    "BOOL": "bool_",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
}


@dataclass(frozen=True)
class Tensor:
    """`dtype` is the format's tag; `data` has the type `DTYPES[dtype]`: BF16 as uint16 bits."""

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""
        return self.data.shape


@dataclass(frozen=True)
class TensorFile:
    """A whole small file; `sha256` is that of the very bytes the tensors were parsed from."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


class OpenTensors:
    """An open file whose header is valid; made by `open_tensors`. Reading is safe from several threads."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        size = os.fstat(descriptor).st_size
        self.head = _read_head(path, descriptor, size)
        self.header = parse(path, self.head, size)

    def read(self, name: str) -> Tensor:
        """Return one tensor, read whole."""
        entry = self.header.entries[name]
        return _tensor(entry, self.read_bytes(entry.start, entry.stop))

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of the file; fewer than that is an error, never zeros."""
        return b"".join(self.chunks(start, stop))

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of the file in pieces of at most `CHUNK_BYTES`."""
        while start < stop:
            chunk = _pread(self.path, self._descriptor, min(CHUNK_BYTES, stop - start), start)
            yield chunk
            start += len(chunk)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[OpenTensors]:
    """Open a safetensors file to be read tensor by tensor.

    Raises `Damaged` if it is missing, not a regular `.safetensors` file, lies in its header, or changes while open.
    """
    with _opened(path) as descriptor:
        before = _identity(descriptor)
        yield OpenTensors(path, descriptor)
        if _identity(descriptor) != before:
            damaged("changed", "the file changed while it was read", path, "run the same command again")


def read_header(path: Path) -> Header:
    """Return the validated header of a safetensors file. Raises `Damaged` as `open_tensors` does."""
    with open_tensors(path) as file:
        return file.header


def load(path: Path, *, sha256: str | None = None) -> TensorFile:
    """Read a whole file once, hash and parse the same bytes.

    Raises `Damaged` if `sha256` is given and the bytes have another, or the header lies.
    """
    with open_tensors(path) as file:
        body = file.read_bytes(len(file.head), file.header.size)
        digest = hashlib.sha256(file.head)
        digest.update(body)
        found = digest.hexdigest()
        if sha256 is not None and found != sha256:
            raise Damaged(
                "tensors.digest",
                "the file's bytes changed since it was written",
                where=str(path),
                why=f"expected sha256 {sha256}, found {found}",
                fix="restore the file or make it again",
            )
        base = len(file.head)
        tensors = {
            name: _tensor(entry, memoryview(body)[entry.start - base : entry.stop - base])
            for name, entry in file.header.entries.items()
        }
        return TensorFile(tensors, file.header.metadata, found)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a new file, sync it, and return its sha256: equal tensors and metadata give equal bytes.

    Tensors lie by descending width, then name, so that each is aligned; the header is padded to 8 bytes.
    Raises `FileExistsError` rather than touch an existing path.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].data.itemsize, name))
    digest = hashlib.sha256()
    with no_resources(path), path.open("xb") as file:
        try:
            for block in (_head_bytes(order, tensors, metadata), *(_bytes(tensors[name]) for name in order)):
                digest.update(block)
                file.write(block)
        except BaseException:
            path.unlink()
            raise
    with no_resources(path):
        sync(path)
    return digest.hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return what the tensors are, apart from any file: names, types, shapes and bytes, in the order of names."""
    return list_digest(
        (name, tensor.dtype, tensor.shape, hashlib.sha256(_bytes(tensor)).hexdigest())
        for name, tensor in tensors.items()
    )


def described(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata with the digest of its tensors: what tells a changed file by itself."""
    return {**metadata, TENSOR_DIGEST: tensor_digest(tensors)}


def list_digest(rows: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Return the digest of tensors given as (name, dtype, shape, sha256 of the bytes), whatever their order."""
    return digest_of("tensors", sorted(rows))


def to_mlx(tensor: Tensor, dtype: mx.Dtype | None = None, *, where: str = "") -> mx.array:
    """Return an evaluated MLX copy, cast to `dtype` if given.

    Raises `Damaged`, naming the file `where`, for types MLX would alter.
    """
    import mlx.core as mx

    if tensor.dtype not in MLX_DTYPES:
        raise Damaged(
            "tensors.dtype",
            f"tensors of type {tensor.dtype} cannot be loaded",
            where=where,
            why=f"expected one of {', '.join(MLX_DTYPES)}",
            fix="convert the file to bfloat16",
        )
    array = mx.array(np.require(tensor.data, requirements=["C", "A"]))
    if tensor.dtype == "BF16":
        array = array.view(mx.bfloat16)
    if dtype is not None:
        array = array.astype(dtype)
    mx.eval(array)
    return array


def from_mlx(array: mx.array) -> Tensor:
    """Return an MLX array's values as a tensor of the same type."""
    import mlx.core as mx

    tags = {getattr(mx, name): tag for tag, name in MLX_DTYPES.items()}
    tag = tags[array.dtype]
    array = mx.contiguous(array.view(mx.uint16) if tag == "BF16" else array)
    # numpy swallows a failed evaluation and shows zeros; eval raises.
    mx.eval(array)
    return Tensor(tag, np.array(array).astype(DTYPES[tag], copy=False))


def _tensor(entry: Entry, data: bytes | memoryview) -> Tensor:
    return Tensor(entry.dtype, np.frombuffer(data, DTYPES[entry.dtype]).reshape(entry.shape))


def _bytes(tensor: Tensor) -> memoryview:
    data = np.ascontiguousarray(tensor.data)
    if data.dtype != DTYPES[tensor.dtype]:
        raise TypeError(f"a {tensor.dtype} tensor is held as {DTYPES[tensor.dtype]}, not {data.dtype}")
    return data.reshape(-1).view(np.uint8).data


def _head_bytes(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.data.nbytes
        fields[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    if path.suffix != SUFFIX:
        damaged("suffix", "not a safetensors file", path, "use a .safetensors file; pickles are never read")
    try:
        # Not blocking: opening a FIFO would wait for a writer that may never come.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        damaged("missing", "the file does not exist", path, "restore the file or make it again")
    except OSError as error:
        raise NoResources(
            "tensors.unreadable", "cannot open", where=str(path), why=str(error.strerror), fix="check its permissions"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            damaged("irregular", "not a regular file", path, "point to a .safetensors file")
        yield descriptor
    finally:
        os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    # Not ctime: renaming another file over this one moves it, and harms no reader.
    return (found.st_size, found.st_mtime_ns)


def _pread(path: Path, descriptor: int, count: int, start: int) -> bytes:
    try:
        data = os.pread(descriptor, count, start)
    except OSError as error:
        raise NoResources(
            "tensors.unreadable", "cannot read", where=str(path), why=str(error.strerror), fix="check the disk"
        ) from error
    if not data:
        damaged("truncated", "the file ends early", path, why=f"nothing at byte {start}")
    return data


def _read_head(path: Path, descriptor: int, size: int) -> bytes:
    """Return the length field and the header's JSON text."""
    if size < 8:
        damaged("truncated", "the file ends inside its header", path, why=f"expected 8 bytes or more, found {size}")
    head = _pread(path, descriptor, 8, 0)
    count = int.from_bytes(head, "little")
    if count > MAX_HEADER_BYTES:
        refuse_other_files(path, head)
        damaged(
            "header", "not a safetensors header", path, why=f"it claims {count} bytes, {MAX_HEADER_BYTES} are allowed"
        )
    if 8 + count > size:
        damaged("truncated", "the file ends inside its header", path, why=f"expected {8 + count} bytes, found {size}")
    while len(head) < 8 + count:
        head += _pread(path, descriptor, 8 + count - len(head), len(head))
    return head
