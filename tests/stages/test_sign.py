"""sign and --trust: a store of other people is believed where somebody one trusts signed for it, and copied whole."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import msgspec
import pytest

from stages.contract.artifacts import _self_digest, _written, read_manifest, record
from stages.contract.trust import distrusted
from tests.stages.project import Project, Ran, listing, new_project
from tests.stages.test_bundle import SSH, STAGES, command, key


def shared(project: Project, tmp_path: Path) -> tuple[Project, Path]:
    """The same dataset with an empty store of its own, and the first project's store, writable by anyone."""
    mine = new_project(tmp_path / "mine")
    theirs = tmp_path / "theirs"
    shutil.copytree(project.store, theirs)
    theirs.chmod(0o777)
    return mine, theirs


def signed(store: Path, by: Path) -> tuple[int, str]:
    """Sign a store while nobody else may write there."""
    store.chmod(0o755)
    try:
        return command("sign", store, "--key", by, cwd=store.parent)
    finally:
        store.chmod(0o777)


def also(project: Project, store: Path, *more: str) -> list[Ran]:
    return [project.run(stage, "--also", str(store), *more) for stage in STAGES]


def test_store_of_ones_own_is_believed_and_one_that_anyone_may_write_to_is_not(
    untrained: Project, tmp_path: Path
) -> None:
    mine, theirs = shared(untrained, tmp_path)
    assert "anyone may write" in distrusted(theirs)
    for ran in also(mine, theirs):
        assert (ran.code, ran.error) == (9, "trust.store")
        assert str(theirs) in ran.stderr
    assert not mine.store.exists()
    theirs.chmod(0o755)
    assert [ran.status for ran in also(mine, theirs)] == ["up to date"] * 3


def test_owner_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path.stat()
    assert distrusted(tmp_path) == ""
    values = list(status)
    values[stat.ST_UID] = 4_000_000
    monkeypatch.setattr(Path, "stat", lambda _, **__: os.stat_result(values))
    assert distrusted(tmp_path) == "it belongs to user 4000000"


@SSH
def test_signed_artifacts_of_others_are_copied_and_unsigned_ones_refused(untrained: Project, tmp_path: Path) -> None:
    mine, theirs = shared(untrained, tmp_path)
    ada, line = key(tmp_path, "ada")
    (tmp_path / "friends").write_text(line)
    trust = ("--trust", str(tmp_path / "friends"))
    assert [ran.error for ran in also(mine, theirs, *trust)] == ["trust.unsigned"] * 3
    code, said = signed(theirs, ada)
    assert (code, "signed 3 artifacts" in said) == (0, True)
    before = listing(mine.root)
    seen = mine.run("why", "encode-text", "--also", str(theirs), *trust)
    assert [each["status"] for each in seen.result["about"]["stages"]] == ["up to date"]
    assert listing(mine.root) == before
    ran = also(mine, theirs, *trust)
    assert [each.status for each in ran] == ["up to date"] * 3
    assert all("signed by ada" in each.stderr for each in ran)
    # Nothing is read from there afterwards.
    shutil.rmtree(theirs)
    assert mine.make("train")["train"].status == "built"


@SSH
@pytest.mark.parametrize("folder", ["", "encode-latents"])
def test_store_that_anyone_may_write_to_is_not_signed(untrained: Project, tmp_path: Path, folder: str) -> None:
    ada, _ = key(tmp_path, "ada")
    (untrained.store / folder).chmod(0o777)
    code, said = command("sign", untrained.store, "--key", ada, cwd=tmp_path)
    assert (code, "error[trust.own_store]" in said) == (9, True)
    assert not (untrained.store / "signatures").exists()
    # As the remedy says.
    (untrained.store / folder).chmod(0o755)
    code, said = command("sign", untrained.store, "--key", ada, cwd=tmp_path)
    assert (code, "warning" in said) == (0, False)


@SSH
def test_folder_without_artifacts_is_not_signed_and_stays_as_it_is(untrained: Project, tmp_path: Path) -> None:
    ada, _ = key(tmp_path, "ada")
    before = listing(untrained.pictures)
    code, said = command("sign", untrained.pictures, "--key", ada, cwd=tmp_path)
    assert (code, "error[sign.nothing]" in said) == (2, True)
    assert listing(untrained.pictures) == before


@pytest.mark.parametrize("name", ["nowhere", "cat.toml"])
def test_other_store_that_is_none_is_told_before_anything_is_made(tmp_path: Path, name: str) -> None:
    project = new_project(tmp_path / "project")
    ran = project.run("validate", "--also", str(project.root / name))
    assert (ran.code, ran.error) == (2, "also.absent")
    assert not project.store.exists()


@SSH
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
def test_who_signs_what_a_group_may_write_to_is_told(untrained: Project, tmp_path: Path) -> None:
    ada, _ = key(tmp_path, "ada")
    untrained.store.chmod(0o775)
    assert "warning" not in command("sign", untrained.store, "--key", ada, cwd=tmp_path)[1]
    os.chown(untrained.store, -1, 12345)
    code, said = command("sign", untrained.store, "--key", ada, cwd=tmp_path)
    assert (code, "warning: a group may write to" in said) == (0, True)


@SSH
@pytest.mark.parametrize("stage", STAGES)
def test_poison_with_recomputed_hashes_is_refused(untrained: Project, tmp_path: Path, stage: str) -> None:
    """Whoever can write to the store gives an artifact other files and a manifest that fits them."""
    mine, theirs = shared(untrained, tmp_path)
    ada, line = key(tmp_path, "ada")
    (tmp_path / "friends").write_text(line)
    assert signed(theirs, ada)[0] == 0
    (folder,) = (theirs / stage).iterdir()
    manifest = read_manifest(folder)
    name = sorted(manifest.files)[0]
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    manifest = msgspec.structs.replace(manifest, files={**manifest.files, name: record(folder / name)})
    manifest = msgspec.structs.replace(manifest, self_digest=_self_digest(manifest))
    (folder / "manifest.json").write_bytes(_written(manifest))
    assert read_manifest(folder) == manifest
    ran = {each.result["stage"]: each for each in also(mine, theirs, "--trust", str(tmp_path / "friends"))}
    assert (ran[stage].code, ran[stage].error) == (9, "trust.unsigned")
    assert not (mine.store / stage).exists()


@SSH
@pytest.mark.parametrize("harm", ["flip", "link", "gone"])
def test_signed_artifact_whose_bytes_changed_is_damage(untrained: Project, tmp_path: Path, harm: str) -> None:
    mine, theirs = shared(untrained, tmp_path)
    ada, line = key(tmp_path, "ada")
    (tmp_path / "friends").write_text(line)
    assert signed(theirs, ada)[0] == 0
    (shard,) = theirs.glob("fragments/latents/*/c.0.0.0.0")
    if harm == "flip":
        data = bytearray(shard.read_bytes())
        data[0] ^= 1
        shard.write_bytes(data)
    else:
        moved = shard.rename(tmp_path / "moved")
        if harm == "link":
            shard.symlink_to(moved)
    ran = also(mine, theirs, "--trust", str(tmp_path / "friends"))[1]
    assert ran.code == 4
    assert ran.error in ("file.changed", "file.link", "file.missing")
    assert not (mine.store / "encode-latents").exists()
