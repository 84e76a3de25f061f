"""What computes here: Metal, CUDA or the CPU, and in which type; on Linux CPUs a fast BLAS under MLX.

MLX's Linux wheel carries the reference BLAS (about 6 GFLOP/s). `prepare` points libmlx's own links to `cblas_*` at
the OpenBLAS of the `scipy-openblas32` wheel: no compiler, no preload, about a millisecond. Source of the structures:
the ELF-64 specification (dynamic section, relocations, symbols) and dlinfo(3).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import mlx.core as mx

REFERENCE_BLAS = "reference BLAS of the MLX wheel (slow: pip install 'flux2-lora[cpu]')"
# R_X86_64_JUMP_SLOT and R_AARCH64_JUMP_SLOT: the relocation types of a link to another library's function.
JUMP_SLOT = {"x86_64": 7, "aarch64": 1026}
DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_JMPREL = 2, 5, 6, 23
RTLD_DI_LINKMAP = 2
# MLX lets go of buffers when the work that uses them is handed to the device. On CUDA it hands over by the gigabyte;
# at 200 MB klein 4B peaks at 15.7, 11.0 instead of 20.6, 16.9 GB (512 px, checkpointed) and at 27.8, 14.2 instead of
# 34.3, 21.0 GB (1024 px), 9B at 22.1 instead of 28.4 GB (512 px, checkpointed), for up to 6 % more time at 1024 px.
# 400 MB cost no time and 1.3 to 1.9 GB more (one H200, mlx 0.32.4).
QUEUE_VARIABLE, QUEUE_MB = "MLX_MAX_MB_PER_BUFFER", "200"


@dataclass(frozen=True)
class Backend:
    """The device of this process, its chip, the type of large matmuls, and the BLAS on CPU (None elsewhere)."""

    device: Literal["cpu", "metal", "cuda"]
    compute_dtype: mx.Dtype
    blas: str | None = None
    chip: str = ""

    @property
    def name(self) -> str:
        """All that decides the bits of a result: device, chip, type, MLX's version and, on CPU, which BLAS."""
        chip, blas = f" ({self.chip})" if self.chip else "", f", {self.blas}" if self.blas else ""
        dtype = str(self.compute_dtype).removeprefix("mlx.core.")
        return f"{self.device}{chip} in {dtype}, mlx {version('mlx')}{blas}"

    def line(self) -> str:
        """Return one line for the person."""
        return f"computing on {self.name}"


def prepare() -> Backend:
    """Return the backend, on Linux CPU after giving MLX a fast BLAS. Call it before the first computation.

    The CPU computes in float32: there bfloat16 matmul never uses BLAS (117 against 3.4 ms for 320x512x2048 on two
    EPYC cores, mlx 0.32.4). The number of threads is OpenBLAS's own affair (`OPENBLAS_NUM_THREADS`).
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return Backend("cpu", mx.float32, _cpu_blas(), _chip())
    if mx.metal.is_available():
        return Backend("metal", mx.bfloat16, chip=_chip())
    # MLX reads it with the first computation.
    os.environ.setdefault(QUEUE_VARIABLE, QUEUE_MB)
    return Backend("cuda", mx.bfloat16, chip=_chip())


def _chip() -> str:
    return str(mx.device_info().get("device_name", ""))


def _cpu_blas() -> str:
    if sys.platform != "linux":
        return "Accelerate"
    return _link_openblas() or REFERENCE_BLAS


def _link_openblas() -> str | None:
    """Point libmlx's `cblas_*` slots at OpenBLAS; return its name, or None where anything does not fit."""
    slot_type = JUMP_SLOT.get(platform.machine())
    libmlx = Path(mx.__file__).parent / "lib" / "libmlx.so"
    if slot_type is None or not libmlx.is_file():
        return None
    try:
        from scipy_openblas32 import get_lib_dir, get_library

        openblas = ctypes.CDLL(str(Path(get_lib_dir()) / get_library(fullname=True)))
        slots = dict(_jump_slots(ctypes.CDLL(str(libmlx)), slot_type))
    except (ImportError, OSError, AttributeError):
        return None
    found = {address: f"scipy_{name}" for name, address in slots.items() if name.startswith("cblas_")}
    if "scipy_cblas_sgemm" not in found.values() or not _writable(found):
        return None
    for address, name in found.items():
        if function := getattr(openblas, name, None):
            ctypes.c_void_p.from_address(address).value = ctypes.cast(function, ctypes.c_void_p).value
    return _description(openblas)


def _description(openblas: ctypes.CDLL) -> str:
    """Return version, kernels and threads: with others, sums come out in another order."""
    for name in ("config", "corename"):
        getattr(openblas, f"scipy_openblas_get_{name}").restype = ctypes.c_char_p
    release = openblas.scipy_openblas_get_config().decode().split()[1]
    kernels, threads = openblas.scipy_openblas_get_corename().decode(), openblas.scipy_openblas_get_num_threads()
    return f"OpenBLAS {release} (scipy-openblas32, {kernels}, threads: {threads})"


class _LinkMap(ctypes.Structure):
    """`struct link_map`: where the loader put a library, and its dynamic section."""

    _fields_ = (("l_addr", ctypes.c_uint64), ("l_name", ctypes.c_char_p), ("l_ld", ctypes.c_uint64))


class _Dyn(ctypes.Structure):
    _fields_ = (("tag", ctypes.c_int64), ("value", ctypes.c_uint64))


class _Rela(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("info", ctypes.c_uint64), ("addend", ctypes.c_int64))


class _Sym(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("rest", ctypes.c_uint8 * 20))


def _jump_slots(library: ctypes.CDLL, slot_type: int) -> Iterator[tuple[str, int]]:
    """Yield (function name, address of the slot that holds its address) for a loaded library's links."""
    entry = ctypes.POINTER(_LinkMap)()
    if ctypes.CDLL(None).dlinfo(ctypes.c_void_p(library._handle), RTLD_DI_LINKMAP, ctypes.byref(entry)) != 0:
        raise OSError("dlinfo failed")
    base = entry.contents.l_addr
    dynamic = _dynamic_section(entry.contents.l_ld)
    # glibc has turned these into addresses; other loaders leave offsets.
    strings, symbols, links = (
        value if (value := dynamic.get(tag, 0)) > base else value + base for tag in (DT_STRTAB, DT_SYMTAB, DT_JMPREL)
    )
    for rela in (_Rela * (dynamic.get(DT_PLTRELSZ, 0) // ctypes.sizeof(_Rela))).from_address(links):
        if rela.info & 0xFFFFFFFF == slot_type:
            symbol = _Sym.from_address(symbols + (rela.info >> 32) * ctypes.sizeof(_Sym))
            yield ctypes.string_at(strings + symbol.name).decode(), base + rela.offset


def _dynamic_section(address: int) -> dict[int, int]:
    section: dict[int, int] = {}
    while (entry := _Dyn.from_address(address)).tag != 0:
        section[entry.tag] = entry.value
        address += ctypes.sizeof(_Dyn)
    return section


def _writable(addresses: dict[int, str]) -> bool:
    """Whether every address lies in a writable mapping: a library linked with full RELRO would crash instead."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        if permissions.startswith("rw"):
            first, last = (int(bound, 16) for bound in span.split("-"))
            ranges.append(range(first, last))
    return all(any(address in span for span in ranges) for address in addresses)
