"""bundle and unbundle: what others made is taken when its bytes and its maker are proved, else not."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from schemas.errors import Damaged
from stages.contract.bundles import opened, parse
from stages.contract.digests import canonical_json, sha256_bytes
from tests.stages.project import Project, contents, draw, edit, new_project
from tests.test_command_line import process

SSH = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="signatures are made by ssh-keygen")
STAGES = ("validate", "encode-latents", "encode-text")


def command(*arguments: str | Path, cwd: Path) -> tuple[int, str]:
    done = process(*arguments, cwd=cwd)
    return done.returncode, done.stderr


def pack(project: Project, name: str = "cat.zip", *more: str) -> Path:
    output = project.root.parent / name
    ran = project.run("bundle", "--output", str(output), *more)
    assert ran.code == 0, ran.stderr
    return output


def unpack(bundle: Path, target: Path, *more: str) -> tuple[int, str]:
    return command("unbundle", bundle, "--output", target, *(more or ("--unsigned",)), cwd=bundle.parent)


def elsewhere(target: Path) -> Project:
    """The unpacked project, its configuration called pipeline.toml and its run as before."""

    class Unpacked(Project):
        @property
        def config(self) -> Path:
            return self.root / "pipeline.toml"

    return Unpacked(target)


def key(folder: Path, name: str) -> tuple[Path, str]:
    """Make an SSH key; return it and its line in a file of allowed signers."""
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path, f"{name} {path.with_suffix('.pub').read_text()}"


def test_bundle_trains_without_the_pictures_to_the_same_lora(project: Project, tmp_path: Path) -> None:
    bundle = pack(project)
    assert unpack(bundle, tmp_path / "far")[0] == 0
    far = elsewhere(tmp_path / "far")
    ran = far.make()
    assert [ran[stage].status for stage in STAGES] == ["up to date"] * 3
    assert ran["train"].status == "built"
    assert far.lora.read_bytes() == project.lora.read_bytes()
    assert not list(far.root.rglob("sources/**/*.png"))
    checked = far.run("verify")
    assert (checked.code, checked.counts["errors"]) == (0, 0)
    again = far.run("encode-latents", "--force")
    assert (again.code, again.error) == (5, "dataset.elsewhere")


def test_command_to_go_on_with_is_one_for_a_shell(untrained: Project, tmp_path: Path) -> None:
    said = unpack(pack(untrained), tmp_path / "my cat")[1]
    there = re.search(r"go on with: (cd .+) && flux2-lora train", said)
    assert there is not None
    assert subprocess.check_output([there[1] + " && ls"], shell=True, text=True).split() == [
        "pipeline.toml",
        "runs",
        "sources",
        "store",
    ]


def test_bundle_is_a_plain_zip_the_same_bytes_each_time_without_pictures_or_paths(untrained: Project) -> None:
    first, second = pack(untrained, "one.zip"), pack(untrained, "two.zip")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
    data = first.read_bytes()
    assert str(untrained.root).encode() not in data
    for picture in untrained.pictures.glob("*.png"):
        assert picture.read_bytes()[200:400] not in data


def test_folder_and_file_unpack_to_the_same_project(untrained: Project, tmp_path: Path) -> None:
    assert unpack(pack(untrained), tmp_path / "one")[0] == 0
    assert unpack(pack(untrained, "folder"), tmp_path / "two")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bundle_names_no_folder_of_this_machine(own_model: Project) -> None:
    shutil.copytree(own_model.root / "model", own_model.root / "sibling")
    edit(own_model.root / "sibling" / "model_index.json", '"is_distilled": false', '"is_distilled": true')
    edit(own_model.config, 'source = "model"', f'source = "{own_model.root / "model"}"')
    edit(own_model.config, "[preview]", f'[preview]\ndistilled = "{own_model.root / "sibling"}"')
    with zipfile.ZipFile(pack(own_model)) as archive:
        text = archive.read("pipeline.toml").decode()
    assert str(own_model.root) not in text
    assert 'source = "flux2-micro"' not in text
    assert 'distilled = "sibling"' in text


def test_class_pictures_and_a_model_of_ones_own_come_along_by_name(own_model: Project, tmp_path: Path) -> None:
    draw(own_model.root / "cats", "tom", (9, 9, 9), "a cat")
    edit(own_model.config, "[train]", '[train.preservation]\nkind = "prior"\n\n[train]')
    edit(own_model.config, "[validate]", '[validate]\nclass_dataset = "cats"')
    own_model.make(*STAGES)
    assert unpack(pack(own_model), tmp_path / "far")[0] == 0
    far = elsewhere(tmp_path / "far")
    shutil.copytree(own_model.root / "model", far.root / "model")
    assert [each.status for each in far.make(*STAGES).values()] == ["up to date"] * 3


def test_bundle_before_its_stages_names_the_one_to_run(tmp_path: Path) -> None:
    fresh = new_project(tmp_path / "project")
    ran = fresh.run("bundle", "--output", str(tmp_path / "cat.zip"))
    assert (ran.code, ran.error) == (5, "input.missing")
    assert not (tmp_path / "cat.zip").exists()


@pytest.mark.parametrize("name", ["there.zip", "full", "no/such/folder.zip"])
def test_bundle_never_writes_over_a_folder(untrained: Project, name: str) -> None:
    (untrained.root / "there.zip").mkdir()
    (untrained.root / "full").mkdir()
    (untrained.root / "full" / "mine").touch()
    ran = untrained.run("bundle", "--output", str(untrained.root / name))
    assert (ran.code, ran.error) == (2, "bundle.output")


def test_pictures_beside_a_stand_in_are_an_error_that_says_what_to_delete(untrained: Project, tmp_path: Path) -> None:
    assert unpack(pack(untrained), tmp_path / "far")[0] == 0
    far = elsewhere(tmp_path / "far")
    shutil.copytree(untrained.pictures, far.root / "sources" / "dataset", dirs_exist_ok=True)
    ran = far.run("validate")
    assert (ran.code, ran.error) == (2, "dataset.stand_in")
    (far.root / "sources" / "dataset" / "pictures-elsewhere.json").unlink()
    assert far.run("validate").status == "up to date"


def repacked(bundle: Path, change: Callable[[dict[str, bytes]], object], target: Path) -> Path:
    """Write a bundle again with other members, its list made to fit."""
    with zipfile.ZipFile(bundle) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    lists = msgspec.json.decode(members.pop("bundle.json"))
    del members["bundle.json.sig"]
    change(members)
    lists["files"] = {
        name: {"size": len(data), "sha256": sha256_bytes(data)} for name, data in sorted(members.items())
    }
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
