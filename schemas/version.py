"""The project's version, known without installed package metadata."""

from __future__ import annotations

VERSION = "0.1.0"
