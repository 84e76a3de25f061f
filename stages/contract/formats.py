"""Which version of the contract a store follows: what another version made is left alone, whole.

The first version says nothing. Any later one writes its number to `<store>/format` before anything else.
"""

from __future__ import annotations

from pathlib import Path

from schemas.errors import Stale
from schemas.manifest import CONTRACT_VERSION

FORMAT = "format"
FIRST_VERSION = 1
# Locks, work in progress and what is remembered of stats: a store with nothing else is of no version yet.
UNVERSIONED = "lookup"


def require_format(store: Path) -> None:
    """Raise Stale when another version of this program made what is in `store`."""
    found = _found(store)
    if found in ("", str(CONTRACT_VERSION)):
        return
    newer = found.isdecimal() and int(found) > CONTRACT_VERSION
    remedy = "update this program" if newer else "use that version"
    raise Stale(
        "store.format",
        f"{'a newer' if newer else 'another'} version of this program made the store",
        where=str(store),
        why=f"expected format {CONTRACT_VERSION}, found {found[:20]}",
        fix=f"{remedy}, or make everything anew in another store: --store DIR",
    )


def missing_note(store: Path) -> bytes | None:
    """Return what is to be written to `<store>/format`; None where nothing is missing."""
    if CONTRACT_VERSION == FIRST_VERSION or (store / FORMAT).exists():
        return None
    return f"{CONTRACT_VERSION}\n".encode()


def _found(store: Path) -> str:
    """Return the version that a store says, or its silence means; "" where there is nothing yet."""
    try:
        return (store / FORMAT).read_text("ascii", "backslashreplace").strip()
    except FileNotFoundError:
        names = (path.name for path in store.glob("[!.]*"))
        return str(FIRST_VERSION) if any(name != UNVERSIONED for name in names) else ""
