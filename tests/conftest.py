"""Shared fixtures: every test runs on the CPU with one BLAS thread."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

pytest_plugins = ["tests.bars"]


def pytest_configure() -> None:
    """Give MLX a fast BLAS before any test computes, as every stage does."""
    from stages.flux2.backend import prepare

    prepare()
    # A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
