"""Bytes from the hub to the cache: asked for from where they broke off, believed when they have their digest.

Plain HTTP, not huggingface_hub's own download (2.4): that keeps nothing of a file when its process ends, be it 7 of
8 GB, and checks no digest. The cache it leaves is the same.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from schemas.errors import Damaged
from stages.contract.digests import StatCache, sha256_file
from stages.contract.publish import make_folder, sync
from stages.hub.cache import Snapshot
from stages.hub.listing import SHA256_DIGITS, TIMEOUT_SECONDS, File, Published

PARTIAL_CONTENT = 206
# Attempts in a row that bring nothing, and the wait after each, times its number.
ATTEMPTS = 4
PAUSE_SECONDS = 1.0
# Answers that another attempt may better: time-outs, too many requests, a server in trouble.
PASSING = (408, 429, 500, 502, 503, 504)

OnBytes = Callable[[int], None]


def present(snapshot: Snapshot, file: File) -> Path | None:
    """Return where the file's bytes are, whatever they are; None where there are none."""
    return next((path for path in (snapshot.folder / file.path, _blob(snapshot, file)) if path.is_file()), None)


def partial_bytes(snapshot: Snapshot, file: File) -> int:
    """Return how much of the file an interrupted fetch left."""
    return min(_size(_partial(snapshot, file)), file.size)


def keep(snapshot: Snapshot, file: File, path: Path, digests: StatCache) -> bool:
    """Whether the bytes at `path` are the published ones: they are linked to their place, others thrown away.

    Their digest is remembered by stat.
    """
    what = f"{len(file.digest)} {path.absolute()}"
    whole = path.stat().st_size == file.size and file.digest == digests.one(
        what, [path], lambda: _found_digest(path, file)
    )
    if whole:
        _link(snapshot, file)
    else:
        for place in (snapshot.folder / file.path, _blob(snapshot, file)):
            place.unlink(missing_ok=True)
    return whole


def load(published: Published, snapshot: Snapshot, file: File, on_bytes: OnBytes) -> None:
    """Load a file to its place; `on_bytes` is told how many bytes more are there, or fewer.

    Raises Damaged if what the hub sends is not what it publishes, and what its client raises when it cannot go on.
    """
    from huggingface_hub import hf_hub_url

    partial = _partial(snapshot, file)
    resumed = _size(partial) > 0
    make_folder(partial.parent)
    partial.touch()
    _fill(hf_hub_url(published.hub_id, file.path, revision=published.commit), file, partial, on_bytes)
    found = _found_digest(partial, file)
    if found == file.digest:
        sync(partial)
        partial.replace(_blob(snapshot, file))
        _link(snapshot, file)
        return
    on_bytes(-_size(partial))
    partial.unlink()
    if not resumed:
        raise Damaged(
            "fetch.digest",
            "the bytes that came are not those the hub publishes",
            where=f"{published.hub_id}/{file.path}",
            why=f"expected {file.digest}, found {found}",
            fix="run it again; if it stays so, a proxy or the mirror of HF_ENDPOINT changes files",
        )
    # What an earlier fetch left may be what was wrong.
    load(published, snapshot, file, on_bytes)


def _fill(url: str, file: File, partial: Path, on_bytes: OnBytes) -> None:
    """Load what is missing of `partial`, over as many connections as it takes while each brings something."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    failures = 0
    while (have := _size(partial)) < file.size:
        try:
            _stream(url, partial, on_bytes)
        except HTTPError as error:
            lasting = isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING
            failures = 0 if _size(partial) > have else failures + 1
            if lasting or failures == ATTEMPTS:
                raise
            time.sleep(PAUSE_SECONDS * failures)


def _stream(url: str, partial: Path, on_bytes: OnBytes) -> None:
    """Append what one answer brings; a server that sends the whole file although asked for the rest is believed."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    have = _size(partial)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # The client follows the hub to where the bytes lie, and takes the token along to no other host.
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as answer:
        hf_raise_for_status(answer)
        with partial.open("ab") as target:
            if answer.status_code != PARTIAL_CONTENT:
                target.truncate(0)
                on_bytes(-have)
            # In the pieces they come in: gathered ones would be lost with the connection.
            for chunk in answer.iter_raw():
                target.write(chunk)
                on_bytes(len(chunk))


def _found_digest(path: Path, file: File) -> str:
    """Return the digest of the bytes at `path`, of the kind that is published for `file`."""
    if len(file.digest) == SHA256_DIGITS:
        return sha256_file(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _link(snapshot: Snapshot, file: File) -> None:
    """Let the file's own path lead to its bytes."""
    pointer, blob = snapshot.folder / file.path, _blob(snapshot, file)
    if pointer.is_file():
        return
    make_folder(pointer.parent)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        # A file system without links, as on many external disks.
        blob.replace(pointer)


def _blob(snapshot: Snapshot, file: File) -> Path:
    return snapshot.root / "blobs" / file.digest


def _partial(snapshot: Snapshot, file: File) -> Path:
    return snapshot.root / "blobs" / f"{file.digest}.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
