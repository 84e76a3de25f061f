"""unbundle: every byte, name and setting of a bundle is proved before anything of it is there."""

from __future__ import annotations

import re
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.errors import Damaged
from stages.contract.bundles import opened, parse
from stages.contract.digests import canonical_json, sha256_bytes
from tests.stages.project import Project, contents, listing
from tests.stages.test_bundle import SSH, STAGES, elsewhere, key, pack, unpack


def test_pictures_beside_a_stand_in_are_an_error_that_says_what_to_delete(untrained: Project, tmp_path: Path) -> None:
    assert unpack(pack(untrained), tmp_path / "far")[0] == 0
    far = elsewhere(tmp_path / "far")
    shutil.copytree(untrained.pictures, far.root / "sources" / "dataset", dirs_exist_ok=True)
    ran = far.run("validate")
    assert (ran.code, ran.error) == (2, "dataset.stand_in")
    (far.root / "sources" / "dataset" / "pictures-elsewhere.json").unlink()
    assert far.run("validate").status == "up to date"


def repacked(
    bundle: Path,
    change: Callable[[dict[str, bytes]], object],
    target: Path,
    relist: Callable[[dict[str, Any]], object] = lambda _: None,
) -> Path:
    """Write a bundle again with other members, its list made to fit."""
    with zipfile.ZipFile(bundle) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    lists = msgspec.json.decode(members.pop("bundle.json"))
    del members["bundle.json.sig"]
    change(members)
    lists["files"] = {
        name: {"size": len(data), "sha256": sha256_bytes(data)} for name, data in sorted(members.items())
    }
    relist(lists)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in {
            "bundle.json": canonical_json(lists),
            "bundle.json.sig": b"",
            **dict(sorted(members.items())),
        }.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)
    return target


EVIL = [
    "../evil",
    "/evil",
    "store/../../evil",
    "store/a/../../../evil",
    "sources/..",
    "store\\evil",
    "store/a\nb/c",
]


@pytest.mark.parametrize("name", EVIL)
def test_member_that_would_lie_outside_is_refused(untrained: Project, tmp_path: Path, name: str) -> None:
    evil = repacked(pack(untrained), lambda members: members.update({name: b"x"}), tmp_path / "evil.zip")
    code, said = unpack(evil, tmp_path / "deep" / "far")
    assert code == 4
    assert "fix: " in said
    assert "\n" not in said.strip()
    assert not (tmp_path / "deep" / "far").exists()
    assert not [path for path in tmp_path.rglob("evil") if path.is_file()]


def nameless(members: dict[str, bytes]) -> None:
    members["pipeline.toml"] = re.sub(rb'(?m)^name = "cat"\n', b"", members["pipeline.toml"])


def of(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    """Return what writes another pipeline into a bundle."""

    def change(members: dict[str, bytes]) -> None:
        assert old in members["pipeline.toml"]
        members["pipeline.toml"] = members["pipeline.toml"].replace(old, new)

    return change


@pytest.mark.parametrize("run", ["../../../../escaped", "/escaped", "", "cat/..", "cat\n"])
def test_run_that_would_lie_outside_is_refused(untrained: Project, tmp_path: Path, run: str) -> None:
    """The receipts of a bundle's stages go into the folder of its run."""
    evil = repacked(pack(untrained), nameless, tmp_path / "evil.zip", lambda lists: lists.update(run=run))
    before = listing(tmp_path)
    code, said = unpack(evil, tmp_path / "far")
    assert (code, "error[bundle.list]" in said) == (4, True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        nameless,
        of(b'name = "cat"', b'name = "dog"'),
        of(b'"sources/dataset"', b'"/etc"'),
        of(b'"sources/dataset"', b'"../../pictures"'),
        of(b'"sources/dataset"', b'"~/pictures"'),
        of(b"[train]", b'[train]\ninit_lora = "/etc/mine.safetensors"'),
        of(b"[validate]", b"[evil]\nx = 1\n[validate]"),
        lambda members: members.update({"pipeline.toml": b"\xff"}),
        lambda members: members.pop("pipeline.toml"),
    ],
)
def test_pipeline_of_another_run_or_of_places_outside_is_refused(
    untrained: Project, tmp_path: Path, change: Callable[[dict[str, bytes]], object]
) -> None:
    evil = repacked(pack(untrained), change, tmp_path / "evil.zip")
    code, said = unpack(evil, tmp_path / "far")
    assert (code, "error[bundle.pipeline] pipeline.toml" in said, str(evil) in said) == (4, True, True)
    assert not (tmp_path / "far").exists()


@pytest.mark.parametrize(
    ("relist", "error"),
    [
        (lambda lists: lists.update(artifacts={}), "bundle.list"),
        (lambda lists: lists["artifacts"].update(train="0" * 64), "bundle.list"),
        (lambda lists: lists["files"]["pipeline.toml"].update(size=-1), "bundle.list"),
        (lambda lists: lists["files"]["pipeline.toml"].update(size=1 << 50), "bundle.member"),
    ],
)
def test_list_that_no_bundle_has_is_refused(
    untrained: Project, tmp_path: Path, relist: Callable[[dict[str, Any]], object], error: str
) -> None:
    code, said = unpack(repacked(pack(untrained), dict, tmp_path / "evil.zip", relist), tmp_path / "far")
    assert (code, f"error[{error}]" in said) == (4, True)


def test_size_that_is_a_lie_takes_no_room(untrained: Project, tmp_path: Path) -> None:
    """Header and list agree on a terabyte: nothing is made ready for that."""
    bundle, evil = pack(untrained), tmp_path / "evil.zip"
    with zipfile.ZipFile(bundle) as archive:
        info = archive.getinfo("pipeline.toml")
    info.file_size = info.compress_size = 1 << 40
    evil.write_bytes(bundle.read_bytes()[: info.header_offset] + info.FileHeader(zip64=True) + b"x")
    tracemalloc.start()
    with opened(evil) as (data, _, members):
        listed = parse(data, evil)
        endless = msgspec.structs.replace(listed.files[info.filename], size=1 << 40)
        with pytest.raises(Damaged, match=r"bundle\.truncated"):
            list(members(msgspec.structs.replace(listed, files={info.filename: endless})))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("stage", STAGES)
def test_manifest_that_is_none_is_told_by_the_bundle_s_name(untrained: Project, tmp_path: Path, stage: str) -> None:
    def harm(members: dict[str, bytes]) -> None:
        (name,) = [each for each in members if each.startswith(f"store/{stage}/") and each.endswith("manifest.json")]
        members[name] = b"{}"

    evil = repacked(pack(untrained), harm, tmp_path / "evil.zip")
    code, said = unpack(evil, tmp_path / "far")
    assert (code, "error[bundle.artifact]" in said, str(evil) in said) == (4, True, True)


@pytest.mark.parametrize(
    "name",
    ["store/lookup/digests.sqlite", "store/checkpoints/a/5/state.safetensors", "store/models/flux2-micro-1/x.json",
     "store/signatures/a.json", "store/fragments/latents/0/zarr.json"],
)  # fmt: skip
def test_file_that_no_artifact_names_is_refused(untrained: Project, tmp_path: Path, name: str) -> None:
    evil = repacked(pack(untrained), lambda members: members.update({name: b"x"}), tmp_path / "evil.zip")
    code, said = unpack(evil, tmp_path / "far")
    assert (code, "error[bundle.files]" in said) == (4, True)
    assert not (tmp_path / "far").exists()


def test_every_cut_and_every_flipped_bit_is_refused_or_changes_nothing(untrained: Project, tmp_path: Path) -> None:
    bundle = pack(untrained)
    data = bundle.read_bytes()
    with zipfile.ZipFile(bundle) as archive:
        end = archive.start_dir
    wrong = tmp_path / "wrong.zip"

    def refused(changed: bytes) -> bool:
        wrong.write_bytes(changed)
        try:
            with opened(wrong) as (listed, _, members):
                list(members(parse(listed, wrong)))
        except Damaged:
            return True
        return False

    assert not refused(data)
    for place in range(0, end, end // 150):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        assert refused(bytes(flipped)), place
        assert refused(data[:place]), place
    assert refused(b"x" + data)
    assert refused(b"PK\x03\x04" + bytes(26))
    wrong.write_text("[run]\nname = 'a text that is long enough to pass for a header'\n")
    code, said = unpack(wrong, tmp_path / "far")
    assert (code, "this is no bundle" in said) == (4, True)


def test_bomb_and_a_million_entries_are_refused_at_once(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", b" " * (32 << 20))
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *[0] * 6, *[0] * 3, 1, *[0] * 4, *[0] * 2) + b"x"
    many = tmp_path / "many.zip"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 1_000_000 * len(entry), 0, 0)
    many.write_bytes(entry * 1_000_000 + end)
    link = tmp_path / "link"
    link.mkdir()
    (link / "bundle.json").symlink_to("/etc/hostname")
    started = time.monotonic()
    for path in (bomb, many, link):
        with pytest.raises(Damaged), opened(path):
            pass
    assert time.monotonic() - started < 1


def test_bundle_whose_list_is_poisoned_still_has_to_fit_its_manifests(untrained: Project, tmp_path: Path) -> None:
    def poison(members: dict[str, bytes]) -> None:
        (shard,) = [name for name in members if name.endswith("c.0.0.0.0")]
        members[shard] = members[shard][::-1]

    code, said = unpack(repacked(pack(untrained), poison, tmp_path / "evil.zip"), tmp_path / "far")
    assert (code, "error[bundle.files]" in said) == (4, True)


def test_nothing_that_is_there_is_overwritten(untrained: Project, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "mine.txt").write_text("mine")
    code, said = unpack(pack(untrained), tmp_path / "far")
    assert (code, "unbundle.output" in said) == (2, True)
    assert contents(tmp_path / "far") == {"mine.txt": b"mine"}


@pytest.mark.parametrize("command_line", [("bundle", "there"), ("bundle", "there.zip"), ("unbundle", "there")])
def test_link_in_the_way_stays_and_is_told(untrained: Project, tmp_path: Path, command_line: tuple[str, str]) -> None:
    name, output = command_line[0], tmp_path / command_line[1]
    bundle, elsewhere = pack(untrained, "whole.zip"), tmp_path / "elsewhere"
    elsewhere.mkdir() if output.suffix == "" else elsewhere.touch()
    output.symlink_to(elsewhere)
    if name == "bundle":
        ran = untrained.run("bundle", "--output", str(output))
        assert (ran.code, ran.error) == (2, "output.symlink")
    else:
        code, said = unpack(bundle, output)
        assert (code, "error[output.symlink]" in said) == (2, True)
    assert output.is_symlink()
    assert not elsewhere.is_dir() or not list(elsewhere.iterdir())


def test_what_a_death_after_the_rename_left_goes_with_the_next_command(untrained: Project, tmp_path: Path) -> None:
    bundle = pack(untrained)
    assert unpack(bundle, tmp_path / "far")[0] == 0
    left = tmp_path / ".far.tmp"
    (left / "0123").mkdir(parents=True)
    (left / "0123.lock").touch()
    assert unpack(bundle, tmp_path / "far")[0] == 2
    assert not left.exists()


@SSH
def test_bundle_is_taken_from_whom_one_trusts_and_from_nobody_else(untrained: Project, tmp_path: Path) -> None:
    mine, line = key(tmp_path, "ada")
    _, other = key(tmp_path, "eve")
    (tmp_path / "friends").write_text(line)
    (tmp_path / "others").write_text(other)
    signed = pack(untrained, "signed.zip", "--key", str(mine))
    for trust, code, error in (("friends", 0, ""), ("others", 9, "trust.signature"), ("absent", 2, "trust.absent")):
        found, said = unpack(signed, tmp_path / f"far-{trust}", "--trust", str(tmp_path / trust))
        assert (found, error in said) == (code, True), said
    assert unpack(signed, tmp_path / "far2", "--quiet")[0] == 9
    unsigned = pack(untrained, "unsigned.zip")
    assert unpack(unsigned, tmp_path / "far3", "--trust", str(tmp_path / "friends"))[0] == 9
    # A signature over another list.
    other_list = repacked(signed, dict, tmp_path / "changed.zip")
    assert unpack(other_list, tmp_path / "far4", "--trust", str(tmp_path / "friends"))[0] == 9
