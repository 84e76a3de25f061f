"""What the hub publishes of a model: its files with sizes and digests at one commit, and its refusals in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from schemas.errors import Damaged, NoResources, StageError
from stages.hub import cache

TIMEOUT_SECONDS = 30.0
SHA1_DIGITS = 40
SHA256_DIGITS = 64
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "run it again: it goes on where it stopped"


@dataclass(frozen=True)
class File:
    """A published file: its size in bytes and its digest, sha256 or, for small ones, git's sha1."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Published:
    """The files of a model at one commit, the smaller first."""

    hub_id: str
    commit: str
    files: tuple[File, ...]


def look_up(hub_id: str, revision: str, wanted: Callable[[str], bool]) -> Published:
    """Ask the hub which commit `revision` is and what it holds: one question, so that all files are of one commit.

    Raises Damaged for a listing without sizes and digests, and what huggingface_hub raises: see `explained`.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    except (ValueError, TypeError, KeyError) as error:
        raise _bad_listing(hub_id, "something else than the hub's answer") from error
    files = [_file(hub_id, each) for each in info.siblings or () if wanted(each.rfilename)]
    if info.sha is None or not cache.COMMIT.fullmatch(info.sha):
        raise _bad_listing(hub_id, f"commit {info.sha}")
    return Published(hub_id, info.sha, tuple(sorted(files, key=lambda file: (file.size, file.path))))


def _file(hub_id: str, listed: Any) -> File:
    """Return a file of the hub's listing, which has `lfs` for large ones."""
    size, digest = (listed.lfs.size, listed.lfs.sha256) if listed.lfs else (listed.size, listed.blob_id)
    known = type(size) is int and size >= 0 and isinstance(digest, str)
    if not known or len(digest) not in (SHA1_DIGITS, SHA256_DIGITS) or not cache.is_path(listed.rfilename):
        raise _bad_listing(hub_id, f"{listed.rfilename}: size {size}, digest {digest}")
    return File(listed.rfilename, size, digest)


def _bad_listing(hub_id: str, found: str) -> Damaged:
    return Damaged(
        "fetch.listing",
        "the hub does not say which files there are, or what to check them by",
        where=hub_id,
        why=f"found {found}",
        fix="leave out HF_ENDPOINT if it names a mirror, or try again later",
    )


@contextlib.contextmanager
def explained(hub_id: str, revision: str) -> Generator[None]:
    """Turn what huggingface_hub and its HTTP client raise into errors with a remedy; no token is ever in them."""
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub.utils import OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise _refused("offline", "HF_HUB_OFFLINE is set", hub_id, "", "unset it to fetch") from error
    except (HTTPError, InvalidURL) as error:
        raise _remedy(error, hub_id, revision) from error


def _remedy(error: Exception, hub_id: str, revision: str) -> StageError:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = f"HTTP {error.response.status_code}" if isinstance(error, HfHubHTTPError) else ""
    match error:
        case GatedRepoError():
            accept = f"accept it on https://huggingface.co/{hub_id}"
            why, log_in = ("the account of your token has not", "") if get_token() else ("no token", f", {LOG_IN}")
            fix = f"{accept}{log_in}, then run this again"
            return _refused("gated", "the model's licence must be accepted first", hub_id, why, fix)
        case RevisionNotFoundError():
            return _refused("revision", "the model has no such revision", hub_id, revision, "correct --revision")
        case RemoteEntryNotFoundError():
            why = error.response.url.path
            return _refused("missing", "the hub lacks a file that it lists", hub_id, why, "try again later")
        case RepositoryNotFoundError():
            fix = f"correct the name; if the model is private, {LOG_IN}"
            return _refused("unknown", "the hub has no such model", hub_id, status, fix)
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return _refused("token", "the hub does not accept your token", hub_id, status, LOG_IN)
        case HfHubHTTPError():
            return _refused("failed", "the hub cannot answer", hub_id, status, AGAIN)
        case _:
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            return _refused("failed", "cannot reach the hub", hub_id, why, AGAIN)


def _refused(code: str, what: str, where: str, why: str, fix: str) -> NoResources:
    return NoResources(f"fetch.{code}", what, where=where, why=why, fix=fix)
