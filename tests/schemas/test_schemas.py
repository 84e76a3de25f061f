"""All schemas: strict, frozen, with a documented meaning; and the names other programs rely on."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from schemas import results
from schemas.base import Strict
from schemas.manifest import Receipt, Result
from schemas.run import Config
from schemas.train import Train

MODULES = sorted(path.stem for path in (Path(__file__).parents[2] / "schemas").glob("[a-z]*.py"))


def structs() -> Iterator[type[Strict]]:
    for name in MODULES:
        module = importlib.import_module(f"schemas.{name}")
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, msgspec.Struct) and each.__module__ == module.__name__:
                yield each


STRUCTS = sorted(structs(), key=lambda each: (each.__module__, each.__name__))


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_struct_is_strict_frozen_and_explained(struct: type[Strict]) -> None:
    config = struct.__struct_config__
    assert issubclass(struct, Strict)
    assert config.frozen
    assert config.forbid_unknown_fields
    assert struct.__doc__
    assert set(struct.NEUTRAL) <= set(struct.__struct_fields__)


@pytest.mark.parametrize("name", Config.__struct_fields__)
def test_every_table_but_the_dataset_has_defaults(name: str) -> None:
    kind = next(field.type for field in msgspec.structs.fields(Config) if field.name == name)
    required = [field.name for field in msgspec.structs.fields(kind) if field.required]
    assert required == (["dataset"] if name == "validate" else [])


def test_tables_are_named_as_their_stages() -> None:
    stages = ["validate", "encode_latents", "encode_text", "train", "preview", "verify"]
    assert [name for name in Config.__struct_fields__ if name in stages] == stages


def test_structs_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Train().steps = 3  # type: ignore[misc]


def test_result_is_the_object_programs_rely_on() -> None:
    result = Result(
        stage="train", status="built", key="k", path="p", digest="d", counts={"steps": 1}, seconds=1.5, error=None
    )
    assert msgspec.json.decode(msgspec.json.encode(result)) == {
        "stage": "train",
        "status": "built",
        "key": "k",
        "path": "p",
        "digest": "d",
        "counts": {"steps": 1},
        "seconds": 1.5,
        "error": None,
    }
    assert msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(result, findings=[])))["findings"] == []


def test_receipt_refuses_what_it_does_not_know() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"stage":"train","key":"k","digest":"d","path":"/"}', type=Receipt)


def test_result_files_have_the_names_people_rely_on() -> None:
    assert results.lora("blue-cat") == "blue-cat.safetensors"
    assert results.checkpoint(50) == "checkpoint_50.safetensors"
    assert results.preview(50) == "preview_50.png"
    assert results.previews(50, 1) == ["preview_50.png"]
    assert results.previews(50, 3) == ["preview_50_1.png", "preview_50_2.png", "preview_50_3.png"]
    assert (results.METRICS, results.CURVES, results.VERIFY, results.LATEST_PREVIEW) == (
        "metrics.jsonl",
        "training_curves.png",
        "verify.json",
        "preview_latest.png",
    )


@pytest.mark.parametrize("name", ["A", "a b", "-a", "", "a/b", "..", "a\n", "ä", "a" * 65])
def test_run_names_are_plain(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"validate": {"dataset": "d"}, "run": {"name": name}}, Config)
