"""The backend: a fast and right matmul on Linux CPUs."""

from __future__ import annotations

import os
import time
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import pytest

from stages.flux2 import backend


def test_matmul_after_prepare_equals_numpy_and_is_fast_with_openblas() -> None:
    prepared = backend.prepare()
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((1024, 1024), dtype=np.float32) for _ in range(2))
    left, right = mx.array(a), mx.array(b)
    mx.eval(left, right)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        product = left @ right
        mx.eval(product)
        seconds.append(time.perf_counter() - started)
    speed = 2 * 1024**3 / min(seconds) / 1e9
    np.testing.assert_allclose(np.array(product), a @ b, rtol=1e-4, atol=1e-3)
    assert prepared.device != "cpu" or prepared.blas is not None
    if prepared.blas is not None and prepared.blas.startswith("OpenBLAS"):
        assert speed > 20, f"{speed:.1f} GFLOP/s with {prepared.blas}"


def test_conv_and_batched_matmul_use_the_prepared_blas_rightly() -> None:
    backend.prepare()
    random = np.random.default_rng(1)
    picture = random.standard_normal((1, 6, 5, 3), dtype=np.float32)
    kernel = random.standard_normal((4, 3, 3, 3), dtype=np.float32)
    got = np.array(mx.conv2d(mx.array(picture), mx.array(kernel)))
    windows = np.lib.stride_tricks.sliding_window_view(picture[0], (3, 3), axis=(0, 1))
    np.testing.assert_allclose(got[0], np.einsum("yxcij,oijc->yxo", windows, kernel), rtol=1e-5, atol=1e-5)
    a = random.standard_normal((3, 5, 7), dtype=np.float32)
    b = random.standard_normal((3, 9, 7), dtype=np.float32)
    np.testing.assert_allclose(
        np.array(mx.array(a) @ mx.array(b).swapaxes(1, 2)), a @ b.swapaxes(1, 2), rtol=1e-5, atol=1e-5
    )


def test_preparing_twice_gives_the_same_backend() -> None:
    assert backend.prepare() == backend.prepare()


def test_name_holds_what_decides_the_bits_of_a_result() -> None:
    prepared = backend.prepare()
    dtype = str(prepared.compute_dtype).removeprefix("mlx.core.")
    for part in (prepared.device, prepared.chip, f"mlx {version('mlx')}", dtype, prepared.blas or ""):
        assert part in prepared.name
    if prepared.blas is not None and prepared.blas.startswith("OpenBLAS"):
        threads = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1)
        assert f"threads: {threads})" in prepared.name


def test_missing_openblas_is_named_and_not_an_error(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy_openblas32", None)
    prepared = backend.prepare()
    assert prepared.blas in {backend.REFERENCE_BLAS, "Accelerate", None}


def test_unknown_machine_keeps_the_reference_blas(monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr("sys.platform", "linux")
    if mx.default_device() == mx.Device(mx.cpu):
        assert backend.prepare().blas == backend.REFERENCE_BLAS


@pytest.mark.parametrize("asked", [None, "1000"])
def test_cuda_lets_go_of_buffers_early_unless_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    # Set and taken away again, so that it is restored.
    monkeypatch.setenv(backend.QUEUE_VARIABLE, asked or "")
    if asked is None:
        monkeypatch.delenv(backend.QUEUE_VARIABLE)
    assert backend.prepare().device == "cuda"
    assert os.environ[backend.QUEUE_VARIABLE] == (asked or backend.QUEUE_MB)
