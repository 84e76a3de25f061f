"""Artifacts: keys from resolved values, manifests that refuse every changed byte, receipts, restored results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import msgspec
import pytest

from schemas.base import Strict
from schemas.encode_latents import EncodeLatents
from schemas.encode_text import EncodeText
from schemas.errors import BadConfig, Damaged, NoResources
from schemas.manifest import Manifest
from schemas.preview import Preview
from schemas.timesteps import LogitNormal, Uniform
from schemas.train import Train
from schemas.validate import Validate
from stages.contract.artifacts import (
    MANIFEST,
    Built,
    Plan,
    artifact_key,
    find,
    holder,
    keyed,
    missing_files,
    read_manifest,
    read_receipt,
    restore_file,
    write_manifest,
    write_receipt,
)
from stages.contract.digests import StatCache

PLAN = Plan({"rate": 1e-4, "prompts": ["a cat", "ein Kätzchen"], "inner": {"kind": "shift"}}, {"pictures": "ab" * 32})


def published(store: Path, plan: Plan = PLAN) -> Path:
    """Write an artifact of two files and one fragment into `store`; return its folder."""
    key = artifact_key("train", 1, plan)
    folder = store / "train" / key
    (folder / "inner").mkdir(parents=True)
    (folder / "lora.bin").write_bytes(b"lora")
    (folder / "inner" / "metrics.jsonl").write_bytes(b"{}\n")
    (store / "fragments").mkdir(exist_ok=True)
    (store / "fragments" / "part").write_bytes(b"part")
    built = Built(roles={"lora": "cd" * 32}, counts={"steps": 8}, fragments={"fragments/part": store})
    write_manifest(folder, ("train", 1, key), plan, built, {"python": "3.11.7"})
    return folder


def test_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = published(tmp_path)
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == ["inner/metrics.jsonl", "lora.bin"]
    assert manifest.files["lora.bin"].size == 4
    assert manifest.fragments["fragments/part"].size == 4
    assert (manifest.params, manifest.inputs) == (PLAN.params, PLAN.inputs)
    assert manifest.counts == {"steps": 8}
    assert artifact_key(manifest.stage, manifest.version, Plan(manifest.params, manifest.inputs)) == folder.name


def test_every_changed_byte_of_a_manifest_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path) / MANIFEST
    whole = path.read_bytes()
    for offset in range(len(whole)):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << offset % 8]) + whole[offset + 1 :])
        with pytest.raises(Damaged):
            read_manifest(path.parent)


REWRITTEN = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "other spacing": lambda data: data.replace(b" ", b"\t", 1),
    "a name twice": lambda data: data.replace(b"{", b'{"stage": "validate",', 1),
}


@pytest.mark.parametrize("change", REWRITTEN.values(), ids=REWRITTEN)
def test_rewritten_manifest_is_refused(tmp_path: Path, change) -> None:
    path = published(tmp_path) / MANIFEST
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Damaged, match="manifest"):
        read_manifest(path.parent)


def test_manifest_of_nested_brackets_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path) / MANIFEST
    path.write_bytes(b"[" * 200_000)
    with pytest.raises(Damaged, match="no readable manifest"):
        read_manifest(path.parent)


def test_artifact_under_another_name_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path)
    moved = folder.rename(folder.parent / ("0" * 64))
    with pytest.raises(Damaged, match="not named by the key"):
        read_manifest(moved)


def test_forged_manifest_with_its_own_digest_is_refused_by_its_key(tmp_path: Path) -> None:
    folder = published(tmp_path)
    forged = Plan({**PLAN.params, "rate": 1e-3}, PLAN.inputs)
    built = Built(roles={"lora": "cd" * 32}, counts={})
    (folder / MANIFEST).unlink()
    write_manifest(folder, ("train", 1, folder.name), forged, built, {})
    with pytest.raises(Damaged, match="key does not follow"):
        read_manifest(folder)


def test_absent_and_shortened_files_are_found(tmp_path: Path) -> None:
    folder = published(tmp_path)
    manifest = read_manifest(folder)
    assert missing_files(manifest, folder, [tmp_path]) == []
    (folder / "lora.bin").write_bytes(b"lor")
    (folder / "inner" / "metrics.jsonl").unlink()
    (tmp_path / "fragments" / "part").unlink()
    assert missing_files(manifest, folder, [tmp_path]) == ["inner/metrics.jsonl", "lora.bin", "fragments/part"]


def test_link_in_place_of_a_file_counts_as_missing(tmp_path: Path) -> None:
    folder = published(tmp_path)
    outside = (folder / "lora.bin").rename(tmp_path / "outside")
    (folder / "lora.bin").symlink_to(outside)
    assert missing_files(read_manifest(folder), folder, [tmp_path]) == ["lora.bin"]


def test_fragment_in_another_store_is_enough(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    folder = published(ours)
    (theirs / "fragments").mkdir(parents=True)
    (ours / "fragments" / "part").rename(theirs / "fragments" / "part")
    assert missing_files(read_manifest(folder), folder, [ours, theirs]) == []
    assert holder("fragments/part", [ours, theirs]) == theirs
    assert holder("fragments/none", [ours, theirs]) == ours


def test_first_store_with_a_manifest_is_found(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    folder = published(theirs)
    (ours / "train" / folder.name).mkdir(parents=True)
    assert find("train", folder.name, [ours, theirs]) == folder
    assert find("train", "0" * 64, [ours, theirs]) is None


def test_key_follows_every_part_of_its_identity() -> None:
    keys = [
        artifact_key("train", 1, PLAN),
        artifact_key("preview", 1, PLAN),
        artifact_key("train", 2, PLAN),
        artifact_key("train", 1, Plan({**PLAN.params, "rate": 2e-4}, PLAN.inputs)),
        artifact_key("train", 1, Plan(PLAN.params, {"pictures": "ac" * 32})),
    ]
    assert len(set(keys)) == len(keys)


def test_key_is_the_same_forever() -> None:
    assert artifact_key("train", 1, PLAN) == "aab43366bb120485b2e65d264fe84e0acb8cc458aef80f295bfdae478a134d58"


def test_key_does_not_follow_the_order_of_names() -> None:
    turned = Plan(dict(reversed(PLAN.params.items())), PLAN.inputs)
    assert artifact_key("train", 1, turned) == artifact_key("train", 1, PLAN)


def test_receipt_is_left_untouched_while_equal(tmp_path: Path) -> None:
    manifest = read_manifest(published(tmp_path))
    write_receipt(tmp_path / "run", manifest)
    before = (tmp_path / "run" / "train.json").stat()
    write_receipt(tmp_path / "run", manifest)
    after = (tmp_path / "run" / "train.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    write_receipt(tmp_path / "run", msgspec.structs.replace(manifest, digest="ef" * 32))
    receipt = read_receipt(tmp_path / "run", "train")
    assert receipt is not None
    assert (receipt.key, receipt.digest) == (manifest.key, "ef" * 32)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"stage": "train"}', b'{"stage":1,"key":"","digest":""}'])
def test_unreadable_receipt_counts_as_absent(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "train.json").write_bytes(data)
    assert read_receipt(tmp_path, "train") is None


def test_result_is_restored_when_absent_or_changed_and_else_left_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "run" / "lora"
    source.write_bytes(b"lora")
    digests = StatCache(tmp_path / "digests.sqlite")
    restore_file(source, target, digests)
    before = target.stat()
    restore_file(source, target, digests)
    assert target.stat().st_ino == before.st_ino
    target.write_bytes(b"LORA")
    restore_file(source, target, digests)
    assert target.read_bytes() == b"lora"


def test_copy_of_what_was_read_short_or_wrong_is_an_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"lora")
    target.write_bytes(b"old")
    for read in (b"lor", b"lorb"):
        monkeypatch.setattr(Path, "read_bytes", lambda _, read=read: read)
        with pytest.raises(NoResources, match="not what the file holds"):
            restore_file(source, target, StatCache(tmp_path / "digests.sqlite"))
        monkeypatch.undo()
        assert target.read_bytes() == b"old"


def test_link_in_place_of_a_result_is_refused_not_followed(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"lora")
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadConfig, match="symbolic link"):
        restore_file(tmp_path / "source", tmp_path / "target", StatCache(tmp_path / "digests.sqlite"))
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


class Inner(Strict, frozen=True, tag_field="kind", tag="inner"):
    NEUTRAL: ClassVar[Mapping[str, object]] = MappingProxyType({"later": None})

    rate: float = 1.0
    later: int | None = None


class Old(Strict, frozen=True):
    steps: int = 10
    inner: Inner = Inner()


class New(Strict, frozen=True):
    """`Old` one release later: `dropout` and `ema` came, and do nothing at their neutral values."""

    NEUTRAL: ClassVar[Mapping[str, object]] = MappingProxyType({"dropout": 0.0, "ema": None})

    steps: int = 10
    inner: Inner = Inner()
    dropout: float = 0.1
    ema: Inner | None = None


def test_field_added_later_leaves_old_keys_valid_at_its_neutral_value() -> None:
    assert keyed(New(dropout=0.0)) == keyed(Old())


def test_field_added_later_moves_the_key_at_any_other_value() -> None:
    assert keyed(New()) == {**keyed(Old()), "dropout": 0.1}
    assert keyed(New(dropout=0.0, ema=Inner(later=3))) == {
        **keyed(Old()),
        "ema": {"kind": "inner", "rate": 1.0, "later": 3},
    }


def test_neutral_fields_of_inner_tables_are_left_out_too() -> None:
    assert keyed(Old()) == {"steps": 10, "inner": {"kind": "inner", "rate": 1.0}}
    assert keyed(Old(inner=Inner(later=0)))["inner"] == {"kind": "inner", "rate": 1.0, "later": 0}


@pytest.mark.parametrize("table", [Validate(dataset="d"), EncodeLatents(), EncodeText(), Train(), Preview()])
def test_defaults_are_resolved_into_the_key(table: Strict) -> None:
    assert set(keyed(table)) == set(table.__struct_fields__) - set(table.NEUTRAL)
    assert set(table.NEUTRAL) <= set(table.__struct_fields__)


def test_chosen_kinds_enter_the_key_with_all_their_fields() -> None:
    values = [keyed(Train(timesteps=each))["timesteps"] for each in (Uniform(), LogitNormal(), LogitNormal(std=2.0))]
    assert [value["kind"] for value in values] == ["uniform", "logit_normal", "logit_normal"]
    assert [value.get("std") for value in values] == [None, 1.0, 2.0]


def test_manifest_says_every_file_by_size_and_digest(tmp_path: Path) -> None:
    data = msgspec.json.decode((published(tmp_path) / MANIFEST).read_bytes())
    assert set(data) == {field.name for field in msgspec.structs.fields(Manifest)}
    assert data["files"]["lora.bin"] == {
        "size": 4,
        "sha256": "d339f720de1fd92a672df9ef19a8cdbda6171cbf33fcd35ad95c46f8aebaf628",
    }
