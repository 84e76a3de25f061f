"""Shared fixtures: every test runs on the CPU with one BLAS thread."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
