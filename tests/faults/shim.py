"""The shim in Python, for where system calls cannot be failed: every file that Python code opens, writes or moves.

It sees what goes through `os` and `open`, which is all that the stages write but SQLite's memory of digests. Used in
a child that was forked for it and never returns: nothing is put back.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.faults.zygote import Request

WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Functions of `os` by what they are called in the log; the second take two paths.
ONE_PATH = {"mkdir": "mkdir", "unlink": "unlink", "remove": "unlink", "rmdir": "unlink", "truncate": "truncate"}
TWO_PATHS = {"rename": "rename", "replace": "rename", "link": "link", "symlink": "link"}


def arm(request: Request, log: int) -> None:
    """Let the file operations below the request's root fail as it says, from now on in this process."""
    Shim(request, log).install()


class Shim:
    """Counts, logs and fails calls, as `shim.c` does."""

    def __init__(self, request: Request, log: int) -> None:
        self._root = request.root
        self._fault = request.fault
        self._log = log
        self._count = 0
        self._write = os.write
        self._paths: dict[int, str] = {}

    def install(self) -> None:
        for names, wrap in ((ONE_PATH, self._one_path), (TWO_PATHS, self._two_paths)):
            for name, operation in names.items():
                setattr(os, name, wrap(getattr(os, name), operation))
        os.open = self._open(os.open)
        os.fsync = self._descriptor(os.fsync, "write", "fsync")
        os.ftruncate = self._descriptor(os.ftruncate, "write", "truncate")
        os.read = self._descriptor(os.read, "read", "read")
        os.pread = self._descriptor(os.pread, "read", "read")
        builtins.open = io.open = self._file(io.open)

    def call(
        self, side: str, operation: str, path: str, act: Callable[[int], Any], other: str = "", size: int = 0
    ) -> Any:
        """Do `act(size)` or fail; `size` is of what is written or read, which may be halved."""
        if not self._below(path) and not self._below(other):
            return act(size)
        due = self._due(side, operation)
        if due == "stop":
            signal.raise_signal(signal.SIGTERM)
        if due == "kill" or (due == "torn" and operation != "write"):
            os.kill(os.getpid(), signal.SIGKILL)
        if due == "errno":
            self._note(side, operation, -1, path, other)
            raise OSError(self._fault.errno, os.strerror(self._fault.errno), path)
        if due == "ended" and operation == "read":
            size = 0
        result = act(size // 2 if due in ("torn", "short") and size > 1 else size)
        if due in ("torn", "kill after"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._note(side, operation, 0, path, other)
        return result

    def path(self, name: Any) -> str:
        """Return the absolute path of a name, or of a descriptor that was opened here."""
        if isinstance(name, int):
            return self._paths.get(name, "")
        return os.path.abspath(os.fsdecode(name))  # noqa: PTH100

    def _below(self, path: str) -> bool:
        return path == self._root or path.startswith(f"{self._root}/")

    def _due(self, side: str, operation: str) -> str:
        fault = self._fault
        if side != fault.side:
            return ""
        self._count += 1
        here = self._count == fault.at or (fault.sticky and self._count > fault.at > 0)
        return fault.mode if here and fault.operation in ("", operation) else ""

    def _note(self, side: str, operation: str, result: int, path: str, other: str) -> None:
        self._write(self._log, f"{self._count}\t{side[0]}\t{operation}\t{result}\t{path}\t{other}\n".encode())

    def _one_path(self, real: Callable[..., Any], operation: str) -> Callable[..., Any]:
        return lambda path, *more, **named: self.call(
            "write", operation, self.path(path), lambda _: real(path, *more, **named)
        )

    def _two_paths(self, real: Callable[..., Any], operation: str) -> Callable[..., Any]:
        return lambda path, other, **named: self.call(
            "write", operation, self.path(path), lambda _: real(path, other, **named), self.path(other)
        )

    def _descriptor(self, real: Callable[..., Any], side: str, operation: str) -> Callable[..., Any]:
        def wrapped(file: Any, *more: Any) -> Any:
            number = file if isinstance(file, int) else file.fileno()
            if side == "write":
                return self.call(side, operation, self.path(number), lambda _: real(number, *more))
            return self.call(
                side, operation, self.path(number), lambda size: real(number, size, *more[1:]), size=more[0]
            )

        return wrapped

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, *more: Any, **named: Any) -> int:
            side = "write" if flags & WRITING_FLAGS else "read"
            descriptor: int = self.call(side, "open", self.path(path), lambda _: real(path, flags, *more, **named))
            self._paths[descriptor] = self.path(path)
            return descriptor

        return wrapped

    def _file(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
            path = self.path(file)
            if not self._below(path):
                return real(file, mode, buffering, *text, **named)
            writing = bool(set("wax+") & set(mode))
            raw = self.call(
                "write" if writing else "read", "open", path, lambda _: Raw(self, path, file, mode.replace("b", ""))
            )
            self._paths[raw.fileno()] = path
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writing else io.BufferedReader
            buffer = kind(raw)
            names = ("encoding", "errors", "newline")
            given = {**dict(zip(names, text, strict=False)), **{key: named[key] for key in names if key in named}}
            return buffer if "b" in mode else io.TextIOWrapper(buffer, **given)

        return wrapped


class Raw(io.FileIO):
    """A file whose every read, write, truncation and close is a call of the shim."""

    def __init__(self, shim: Shim, path: str, file: Any, mode: str) -> None:
        self._shim = shim
        self._path = path
        super().__init__(file, mode)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        write = super().write
        return self._shim.call("write", "write", self._path, lambda size: write(view[:size]), size=len(view))

    def truncate(self, size: int | None = None, /) -> int:
        truncate = super().truncate
        return self._shim.call("write", "truncate", self._path, lambda _: truncate(size))

    def readinto(self, buffer: Any, /) -> int | None:
        view = memoryview(buffer).cast("B")
        read = super().readinto
        return self._shim.call("read", "read", self._path, lambda size: read(view[:size]), size=len(view))

    def close(self) -> None:
        if self.closed or not self.writable():
            super().close()
            return
        close = super().close
        try:
            self._shim.call("write", "close", self._path, lambda _: close())
        finally:
            close()
