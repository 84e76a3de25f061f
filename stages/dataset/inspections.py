"""What a look at a picture found, remembered by its bytes: they are decoded once, whatever the file is called.

A remembered answer is only for these bytes, read by this version of the decoder under the same limit. Faults are not
remembered: whoever mends a machine or a file is believed at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from schemas.errors import Fault
from stages.contract.digests import StatCache, digest_of
from stages.dataset.decoder import decoders
from stages.dataset.pixels import INSPECTION_VERSION, Inspected


@dataclass(frozen=True)
class Look:
    """How pictures are looked at: `glance` believes their headers, `memory` knows what was decoded before."""

    glance: bool = False
    memory: StatCache | None = None

    def inspect(self, folder: Path, names: Sequence[str], max_megapixels: float) -> Iterator[Inspected | Fault]:
        """Yield what each of these pictures below `folder` is, or its fault. Raises as `Decoders.inspect`."""
        keys = _keys(self.memory, folder, names, max_megapixels)
        known = _recalled(self.memory, keys)
        unseen = [name for name in names if name not in known]
        found = decoders(max_megapixels).inspect(folder, unseen, glance=self.glance)
        fresh: dict[str, Inspected] = {}
        try:
            for name in names:
                outcome = known[name] if name in known else next(found)
                if name not in known and isinstance(outcome, Inspected):
                    fresh[name] = outcome
                yield outcome
        finally:
            if self.memory is not None and not self.glance:
                _remember(self.memory, keys, fresh)


ANEW = Look()


def _keys(
    memory: StatCache | None, folder: Path, names: Sequence[str], max_megapixels: float
) -> dict[str, tuple[str, str]]:
    """Return (sha256, what its look is remembered under) of every picture; nothing where one cannot be read."""
    if memory is None:
        return {}
    from PIL import __version__ as decoder

    try:
        digests = memory.files([folder / name for name in names])
    except OSError:
        return {}
    how = [INSPECTION_VERSION, decoder, max_megapixels]
    # A note tells of a suffix that says another format.
    suffixes = [name.rpartition(".")[2].lower() for name in names]
    return {
        name: (sha256, f"inspection {digest_of('inspection', [*how, sha256, suffix])}")
        for name, sha256, suffix in zip(names, digests, suffixes, strict=True)
    }


def _recalled(memory: StatCache | None, keys: dict[str, tuple[str, str]]) -> dict[str, Inspected]:
    if memory is None:
        return {}
    found = memory.recall([what for _, what in keys.values()])
    return {
        name: msgspec.json.decode(found[what], type=Inspected) for name, (_, what) in keys.items() if what in found
    }


def _remember(memory: StatCache, keys: dict[str, tuple[str, str]], seen: dict[str, Inspected]) -> None:
    """Keep what was found, each under the bytes that were decoded: a file may have changed since it was hashed."""
    memory.remember(
        {
            keys[name][1]: msgspec.json.encode(each).decode()
            for name, each in seen.items()
            if name in keys and keys[name][0] == each.image_sha256
        }
    )
