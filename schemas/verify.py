"""`[verify]`: nothing to set yet; depth is a flag, because it changes no byte."""

from __future__ import annotations

from schemas.base import Strict


class Verify(Strict, frozen=True):
    """An empty table."""
