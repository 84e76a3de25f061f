"""Whose word counts: a digest proves what bytes are, never that these latents belong to that picture.

What a store says is believed when its folder belongs to this user (or root) and nobody else may write there. Of any
other store named with `--also`, an artifact is believed when somebody in the `--trust` file signed for it; it is then
copied into our own store, every byte checked on the way, so that nothing is ever read from there again.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import msgspec

from schemas.base import UNREADABLE, Strict
from schemas.errors import BadConfig, Damaged, Untrusted
from schemas.manifest import FileRecord, Manifest
from stages.contract.artifacts import MANIFEST, read_manifest, stays_inside
from stages.contract.digests import canonical_json, sha256_bytes
from stages.contract.job import Job
from stages.contract.publish import publish_file, publish_folder, workspace, write_file

SIGNATURES = "signatures"
PURPOSE = "flux2-lora-store"
MOST_STATEMENT_BYTES = 64 << 20


class Statement(Strict, frozen=True):
    """What a signature on a store covers: the sha256 of the manifest of each artifact, by `<stage>/<key>`."""

    artifacts: dict[str, str]


def distrusted(store: Path) -> str:
    """Return why the word of `store` does not count for itself; "" when it does, or is not there."""
    try:
        status, folders = store.stat(), open_to_all(store)
    except OSError:
        return ""
    if status.st_uid not in (os.getuid(), 0):
        return f"it belongs to {_user(status.st_uid)}"
    return f"anyone may write to {folders[0]}" if folders else ""


def open_to_all(store: Path) -> list[Path]:
    """Return which of a store's folders, itself first, anyone on this machine can put something into."""
    return [path for path in _folders(store) if path.stat().st_mode & stat.S_IWOTH]


def open_to_others(store: Path) -> list[Path]:
    """Return which of them a group that is not this user's own can put something into."""
    found = [(path, path.stat()) for path in _folders(store)]
    return [path for path, each in found if each.st_mode & stat.S_IWGRP and each.st_gid != os.getgid()]


def _folders(store: Path) -> list[Path]:
    return [path for path in (store, *sorted(store.iterdir())) if path.is_dir()] if store.is_dir() else []


def require_own(store: Path) -> None:
    """Raise Untrusted when the store that we write to may hold what somebody else put there."""
    if why := distrusted(store):
        raise Untrusted(
            "trust.own_store",
            "others can put into this store what they like",
            where=str(store),
            why=why,
            fix="chmod o-w and chown it, if you trust what is in it; or start another (--store DIR), which can take "
            f"from this one what people you trust signed (--also {store} --trust FILE)",
        )


def require_trust(also: Sequence[Path], allowed: Path | None) -> None:
    """Raise Untrusted for stores whose word does not count, unless there are `allowed` signers to ask for.

    Raises BadConfig for one that is not there: all that it was to give would be made again without a word.
    """
    for store in also:
        if not store.is_dir():
            raise BadConfig("also.absent", "there is no such store", where=f"--also {store}", fix="correct the path")
        why = distrusted(store)
        if why and allowed is None:
            raise Untrusted(
                "trust.store",
                "this store is not yours",
                where=str(store),
                why=why,
                fix="--trust FILE takes what those listed there signed (flux2-lora sign); or chown and chmod o-w",
            )


def sign_store(store: Path, key: Path) -> int:
    """Sign for every whole artifact in `store`, in one statement; return their number.

    Raises as `sign` does, BadConfig where there is none, and Untrusted where anyone could have put artifacts there:
    nobody can answer for those.
    """
    require_own(store)
    listed: dict[str, str] = {}
    for path in sorted(store.glob(f"*/*/{MANIFEST}")):
        if not path.parent.parent.name.startswith("."):
            read_manifest(path.parent)
            listed[f"{path.parent.parent.name}/{path.parent.name}"] = sha256_bytes(path.read_bytes())
    if not listed:
        fix = "name the folder of artifacts, which --store does"
        raise BadConfig("sign.nothing", "there is no artifact to sign", where=str(store), fix=fix)
    from stages.contract.signatures import sign

    data = canonical_json(Statement(artifacts=listed))
    target = store / SIGNATURES / f"{sha256_bytes(data)}.json"
    signature = sign(data, key, PURPOSE)
    write_file(target, data)
    write_file(target.with_suffix(".sig"), signature)
    return len(listed)


def adopt(job: Job, stage: str, key: str) -> Path | None:
    """Return the artifact in our own store, copied from the first of other people's that has it signed.

    Where nothing may be written, it is returned where it lies.

    Raises Untrusted when one has it unsigned, Damaged when its bytes are not those that were signed for.
    """
    for store in job.foreign:
        if (store / stage / key / MANIFEST).is_file():
            data = read_regular(store, f"{stage}/{key}/{MANIFEST}")
            name = _vouched(store, f"{stage}/{key}", sha256_bytes(data), job.allowed)
            if job.look_only:
                return store / stage / key
            take(store, stage, key, job.store)
            job.say(f"{stage}: taken from {store}, signed by {name}")
            return job.store / stage / key
    return None


def take(source: Path, stage: str, key: str, store: Path) -> None:
    """Copy an artifact and its fragments from the store `source` into `store`, every byte checked.

    Raises Damaged when a file is absent, a link, named outside its place, or not what the manifest says.
    """
    with workspace(store) as space:
        work, parts = space / "artifact" / stage / key, space / "parts"
        work.mkdir(parents=True)
        (work / MANIFEST).write_bytes(read_regular(source, f"{stage}/{key}/{MANIFEST}"))
        manifest = read_manifest(work)
        if (manifest.stage, manifest.key) != (stage, key):
            raise _damaged("manifest.misplaced", "the artifact is another one", source / stage / key)
        for name, entry in manifest.files.items():
            _copy(source, f"{stage}/{key}/{name}", entry, work / inside(name))
        for name, entry in manifest.fragments.items():
            _copy(source, name, entry, parts / inside(name, below="fragments"))
        _publish(parts, manifest, store)
        publish_folder(work, store / stage / key)


def _publish(parts: Path, manifest: Manifest, store: Path) -> None:
    """Publish the fragments, those that are folders whole."""
    for name in sorted({"/".join(PurePosixPath(each).parts[:3]) for each in manifest.fragments}):
        publish = publish_folder if (parts / name).is_dir() else publish_file
        publish(parts / name, store / name)


def _vouched(store: Path, name: str, sha256: str, allowed: Path | None) -> str:
    """Return who signed for the artifact's manifest. Raises Untrusted when nobody in `allowed` did."""
    from stages.contract.signatures import signer

    reason = ""
    for path in sorted((store / SIGNATURES).glob("*.json")):
        try:
            data = read_regular(store, f"{SIGNATURES}/{path.name}", MOST_STATEMENT_BYTES)
            statement = msgspec.json.decode(data, type=Statement)
            if allowed is not None and statement.artifacts.get(name) == sha256:
                signature = read_regular(store, f"{SIGNATURES}/{path.stem}.sig", MOST_STATEMENT_BYTES)
                return signer(data, signature, allowed, PURPOSE)
        except Untrusted as error:
            reason = error.faults[0].why
        except (Damaged, *UNREADABLE):
            reason = "a signature is missing or damaged"
    raise Untrusted(
        "trust.unsigned",
        "nobody you trust signed for this artifact",
        where=str(store / name),
        why=reason,
        fix=f"ask its maker for flux2-lora sign {store}, or leave out --also to make it yourself",
    )


def read_regular(root: Path, name: str, most_bytes: int = 1 << 40) -> bytes:
    """Return the bytes of the file `name` below `root`. Raises Damaged unless it is one, with no link on the way."""
    path = root
    for part in inside(name).parts:
        path /= part
        if path.is_symlink():
            raise _damaged("file.link", "a symbolic link where a file is expected", path)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes:
                raise _damaged("file.not_regular", "not a regular file of bearable size", path)
            return file.read()
    except OSError as error:
        raise _damaged("file.missing", "cannot read a file", path, error.strerror or "") from error


def _copy(source: Path, name: str, entry: FileRecord, target: Path) -> None:
    data = read_regular(source, name, entry.size)
    if len(data) != entry.size or sha256_bytes(data) != entry.sha256:
        raise _damaged("file.changed", "a file is not what its manifest says", source / name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def inside(name: str, below: str = "") -> PurePosixPath:
    """Return a name from a manifest as a path. Raises Damaged when it could lead out of where it belongs."""
    path = PurePosixPath(name)
    if not stays_inside(name) or (below and (path.parts[0] != below or len(path.parts) < 3)):
        raise _damaged("manifest.name", "a name that leads out of the store", name)
    return path


def _damaged(code: str, what: str, where: Path | str, why: str = "") -> Damaged:
    return Damaged(code, what, where=str(where), why=why, fix="ask its maker for a whole copy, or do without it")


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
