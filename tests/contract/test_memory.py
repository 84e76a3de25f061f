"""Memory that ran out is no bug of this program: it is told from other errors, and has a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import NoResources
from stages.contract.memory import is_out_of_memory
from stages.contract.publish import no_resources

SHAPES = RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than ..."), True),
        (RuntimeError("[malloc_or_wait] Unable to allocate 99 bytes."), True),
        (RuntimeError("cudaMallocAsync(&buf->data, size, stream) failed: out of memory"), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"), True),
        (MemoryError(), True),
        (SHAPES, False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, *, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    with pytest.raises(NoResources if expected else RuntimeError) as raised, no_resources(Path()):
        raise error
    if expected:
        assert "flux2-lora plan" in str(raised.value)
