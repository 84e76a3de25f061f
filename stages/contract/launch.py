"""Whether this process was launched together with others, as `mlx.launch` and MPI do."""

from __future__ import annotations

import os

# What mlx.launch and the starters of MPI tell a process of its place.
VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


def launched_rank() -> int | None:
    """Return this process's place among those launched together, from 0; None when it runs alone."""
    told = next((os.environ[name] for name in VARIABLES if name in os.environ), None)
    return None if told is None else int(told)
