"""Memory that ran out, told from other errors: MLX has no class of its own for it."""

from __future__ import annotations

# Of MLX's allocators (CPU, Metal, CUDA) and of the CUDA and Metal drivers.
OUT_OF_MEMORY = ("malloc", "out of memory", "unable to allocate", "insufficient memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` was raised because an allocation failed."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
