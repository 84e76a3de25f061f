"""Signatures by SSH keys, made and checked by `ssh-keygen -Y`: who says so, where a digest only says what.

Whose word counts is a file in OpenSSH's format ALLOWED SIGNERS: lines of a name and a public key.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import BadConfig, NoResources, Untrusted

SECONDS = 300


def sign(data: bytes, key: Path, purpose: str) -> bytes:
    """Return the signature over `data` by an SSH key; `purpose` keeps it from passing for another kind of promise.

    Raises BadConfig when the key cannot sign, NoResources without ssh-keygen.
    """
    if not key.is_file():
        raise BadConfig(
            "key.absent", "no such key", where=str(key), fix="name an SSH key; ssh-keygen -t ed25519 makes one"
        )
    done = _ssh_keygen(["sign", "-q", "-f", str(key), "-n", purpose], data)
    if done.returncode:
        raise BadConfig("key.unusable", "the key cannot sign", where=str(key), why=_why(done), fix="name another key")
    return done.stdout


def signer(data: bytes, signature: bytes, allowed: Path, purpose: str) -> str:
    """Return who of the `allowed` signed `data`. Raises Untrusted when none did, BadConfig without that file."""
    if not allowed.is_file():
        fix = 'name a file with a line "NAME ssh-ed25519 KEY" for each person you trust'
        raise BadConfig("trust.absent", "no such file of allowed signers", where=str(allowed), fix=fix)
    with tempfile.NamedTemporaryFile() as file:
        file.write(signature)
        file.flush()
        found = _ssh_keygen(["find-principals", "-s", file.name, "-f", str(allowed)], data)
        for name in found.stdout.decode("utf-8", "replace").splitlines() if not found.returncode else ():
            checked = ["verify", "-f", str(allowed), "-I", name, "-n", purpose, "-s", file.name]
            if not _ssh_keygen(checked, data).returncode:
                return name
    raise Untrusted(
        "trust.signature",
        "the signature is by nobody you trust, or of other bytes",
        where=str(allowed),
        why=_why(found),
        fix="add the signer's public key to that file, if you trust them",
    )


def _ssh_keygen(arguments: Sequence[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["ssh-keygen", "-Y", *arguments], input=data, capture_output=True, check=False, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoResources(
            "ssh_keygen.failed", "cannot run ssh-keygen", why=str(error), fix="install OpenSSH 8.2 or later"
        ) from error


def _why(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
