"""The Hugging Face cache on this machine: where a model's files lie, and which commit a revision stands for.

The layout is that of huggingface_hub, so that other tools find what `fetch` brought, and it what they did:
`models--<org>--<name>/` with `blobs/<digest>`, `snapshots/<commit>/<path>` linking there, and `refs/<branch or tag>`,
each holding a commit. On the fast path of every stage: nothing heavy is imported, the network is not touched.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MAIN = "main"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
# One part of a path inside a repository: none of these leads out of its folder.
PART = re.compile(r"\w[\w.+-]*")
# The first that is set wins, as in huggingface_hub.
VARIABLES = (
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
)


@dataclass(frozen=True)
class Snapshot:
    """A model in the cache as it was at one commit."""

    root: Path
    commit: str

    @property
    def folder(self) -> Path:
        """The folder that the stages open."""
        return self.root / "snapshots" / self.commit


def hub_cache() -> Path:
    """Return the folder the Hugging Face tools keep downloads in, as they find it themselves."""
    for variable, below in VARIABLES:
        if folder := os.environ.get(variable):
            return Path(os.path.expandvars(folder)).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


def repository(hub_id: str) -> Path:
    """Return the folder of everything the cache holds of a model."""
    return hub_cache() / f"models--{hub_id.replace('/', '--')}"


def is_path(text: str) -> bool:
    """Whether the name of a revision or a published file stays below the folder it is put in."""
    return all(PART.fullmatch(part) for part in text.split("/"))


def commit_of(hub_id: str, revision: str) -> str | None:
    """Return the commit that a branch or tag stood for when it was last fetched; a commit stands for itself."""
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (repository(hub_id) / "refs" / revision).read_text("utf-8").strip() if is_path(revision) else ""
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError):
        return None
    return commit if PART.fullmatch(commit) else None


def find_snapshot(hub_id: str, revision: str) -> Snapshot | None:
    """Return the model at that revision, or None where it was never fetched."""
    commit = commit_of(hub_id, revision)
    snapshot = Snapshot(repository(hub_id), commit or "")
    return snapshot if commit and snapshot.folder.is_dir() else None
