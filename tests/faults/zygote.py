"""A process with everything imported, which forks a child for every command it is told: a stage without its start.

Requests and answers are lines of JSON on stdin and stdout; see `Request` and `Answer`. Nothing is computed before the
fork, so that MLX, OpenBLAS and zarr start their threads in the children.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

# What stages import late; here once, before the first fork, with all that is ours.
WARM = """
google_crc32c matplotlib.backends.backend_agg matplotlib.pyplot mlx.core mlx.nn mlx.optimizers numpy PIL.Image
PIL.ImageCms PIL.ImageDraw pyarrow.parquet rich.progress sqlite3 tokenizers zarr
"""
STAGES = Path(__file__).parents[2] / "stages"
MODES = {"none": 0, "kill": 1, "kill after": 2, "torn": 3, "errno": 4, "short": 5, "ended": 6, "stop": 7}
POLL_SECONDS = 0.003
SIDES = {"write": 1, "read": 2}


class Fault(msgspec.Struct, frozen=True):
    """The `at`-th call (from 1; 0 is none) of a side fails so; `sticky`: and every one after it."""

    side: str = "write"
    at: int = 0
    mode: str = "none"
    errno: int = 0
    sticky: bool = False
    operation: str = ""


class Request(msgspec.Struct, frozen=True):
    """A command line, the folder that it runs in and whose files fail, and a script that is run before it.

    Without a command line the script does the work, and calls `arm()` when the faults are to begin.
    """

    arguments: list[str]
    root: str
    fault: Fault = Fault()
    script: str = ""
    seconds: float = 120.0


class Answer(msgspec.Struct, frozen=True):
    """The exit code (negative: the signal that killed it), what it printed, and the log of its file operations."""

    code: int
    out: str
    err: str
    log: str
    seconds: float


def serve() -> None:
    ours = (
        path.relative_to(STAGES.parent).with_suffix("") for path in STAGES.rglob("*.py") if path.stem != "__main__"
    )
    for name in [*WARM.split(), *(".".join(each.parts) for each in ours if each.name != "__init__")]:
        importlib.import_module(name)
    from stages.console import charts
    from stages.contract.config import load_config
    from stages.flux2.backend import prepare

    prepare()
    # The first configuration costs ten times the second: its types are made.
    load_config(STAGES.parent / "pipelines" / "demo.toml")
    # Drawn once: a third of a small training is its charts, and what is tried here is how files are written.
    drawn = charts._curves_png([])
    charts._curves_png = lambda _: drawn
    arm = armed()
    scratch = Path(sys.argv[1])
    # What is there now is never collected: no child copies all of it in order to look.
    gc.collect()
    gc.freeze()
    say = os.fdopen(os.dup(1), "wb", buffering=0)
    say.write(b"ready\n")
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        say.write(msgspec.json.encode(answer(request, scratch, arm)) + b"\n")


def armed() -> Callable[[Request, int], None]:
    """Return what wakes the shim for a request: the library's when it is loaded, else the one in Python."""
    try:
        fault_arm = ctypes.CDLL(None).fault_arm
    except AttributeError:
        from tests.faults import shim

        return shim.arm

    def arm(request: Request, log: int) -> None:
        each = request.fault
        fault_arm(
            os.fsencode(request.root), log, SIDES[each.side], ctypes.c_long(each.at), MODES[each.mode],
            each.errno, int(each.sticky), each.operation.encode(),
        )  # fmt: skip

    return arm


def answer(request: Request, scratch: Path, arm: Callable[[Request, int], None]) -> Answer:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        behave(request, scratch, arm)
    code = waited(child, request.seconds)
    out, err, log = ((scratch / name).read_text(errors="replace") for name in ("out", "err", "log"))
    return Answer(code, out, err, log, time.monotonic() - began)


def waited(child: int, seconds: float) -> int:
    """Return the child's exit code; one that hangs is killed and shows as such."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGXCPU)
        time.sleep(POLL_SECONDS)


def behave(request: Request, scratch: Path, arm: Callable[[Request, int], None]) -> None:
    """Be the child: never returns."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    code = 1
    try:
        os.chdir(request.root)
        from stages.cli import run

        names = {"__name__": "script", "arm": lambda: arm(request, log)}
        exec(compile(request.script, "script", "exec"), names)
        if request.arguments:
            arm(request, log)
        code = run(request.arguments) if request.arguments else 0
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # noqa: BLE001
        # What nobody foresaw is a bug, and shows as one: exit 1.
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
