"""encode-text: one embedding per distinct text, a role for each use, and what a changed tokenizer costs."""

from __future__ import annotations

import re
from collections import Counter

from schemas.tables import EMBEDDING_INDEX
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.variants import MICRO
from tests.stages.project import Project, listing, rows, truncate, undefined


def test_index_has_captions_the_empty_text_and_prompts(finished: Project) -> None:
    index = rows(finished.run("encode-text").folder / "index.parquet")
    assert set(index[0]) == set(EMBEDDING_INDEX.columns)
    assert Counter(row["role"] for row in index) == {"caption": 4, "empty": 1, "prompt": 1}
    assert {row["text"] for row in index if row["role"] != "caption"} == {"", "a red zorb"}
    assert {row["length"] for row in index} == {MICRO.text_encoder.length}
    assert {row["dtype"] for row in index} == {"bfloat16"}


def test_parts_are_parquet_that_anyone_reads(finished: Project) -> None:
    for row in rows(finished.run("encode-text").folder / "index.parquet"):
        record = rows(finished.store / row["fragment"])[row["row"]]
        assert list(record) == ["embedding_key", "data"]
        assert record["embedding_key"] == row["embedding_key"]
        assert len(record["data"]) == row["length"] * row["width"] * 2


def test_same_caption_twice_is_encoded_once(project: Project) -> None:
    for name in ("ada", "bob"):
        (project.pictures / f"{name}.txt").write_text("one caption for both")
    ran = project.make("validate", "encode-text")["encode-text"]
    assert ran.counts == {"total": 5, "encoded": 1, "reused": 4}


def test_prompt_that_is_a_caption_is_not_encoded_again(project: Project) -> None:
    sets = ('preview.prompts=["a zorb called ada"]',)
    ran = project.make("encode-text", sets=sets)["encode-text"]
    assert ran.counts == {"total": 5, "encoded": 0, "reused": 5}


def test_prompts_in_another_order_are_the_same_texts(project: Project) -> None:
    project.make("encode-text", sets=('preview.prompts=["one", "two"]',))
    ran = project.make("encode-text", sets=('preview.prompts=["two", "one", "two"]',))["encode-text"]
    assert ran.status == "up to date"


def test_prompt_that_keeps_its_placeholder_is_warned_of(project: Project) -> None:
    for path in project.pictures.glob("*.txt"):
        path.write_text(f"a thing called {path.stem}")
    ran = project.make(
        "validate", "encode-text", sets=('validate.trigger=""', "preview.prompts=['a [trigger]', 'b']")
    )
    assert "warning: preview.prompts hold [trigger], and no validate.trigger is set" in ran["encode-text"].stderr
    again = project.make("validate", "encode-text", sets=("preview.prompts=['a [trigger]', 'b']",))
    assert "warning: " not in again["encode-text"].stderr


def test_another_type_is_encoded_anew(project: Project) -> None:
    ran = project.make("encode-text", sets=("encode_text.dtype=float32",))["encode-text"]
    assert ran.counts == {"total": 6, "encoded": 6, "reused": 0}


def test_windows_line_ends_byte_order_mark_and_outer_spaces_change_no_text(project: Project) -> None:
    path = project.pictures / "ada.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b" \r\n")
    ran = project.make("validate", "encode-text")
    assert (ran["validate"].status, ran["encode-text"].status) == ("built", "up to date")


def test_changed_tokenizer_encodes_everything_anew(own_model: Project) -> None:
    path = own_model.root / "model" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert own_model.make("encode-text")["encode-text"].counts == {"total": 6, "encoded": 6, "reused": 0}


def test_forced_run_gives_the_same_digest(project: Project) -> None:
    before = project.run("encode-text")
    forced = project.run("encode-text", "--force")
    assert forced.counts == {"total": 6, "encoded": 6, "reused": 0}
    assert forced.result["digest"] == before.result["digest"]


def test_caption_longer_than_the_model_reads_is_cut_with_a_warning(project: Project) -> None:
    (project.pictures / "ada.txt").write_text("word " * 400)
    ran = project.make("validate", "encode-text")["encode-text"]
    warning = re.search(rf"cut to {MICRO.text_encoder.length} of (\d+) tokens: zorb word word", ran.stderr)
    assert warning is not None
    assert int(warning[1]) > 400


def test_caption_that_just_fits_is_not_called_cut(project: Project) -> None:
    (path,) = (project.store / "models").glob("*/tokenizer/tokenizer.json")
    tokenizer = Tokenizer(path, MICRO.text_encoder)
    captions = {tokenizer.encode(f"zorb{' red' * count}").whole: f"zorb{' red' * count}" for count in range(64)}
    for more, cut in ((0, False), (1, True)):
        (project.pictures / "ada.txt").write_text(captions[MICRO.text_encoder.length + more])
        assert ("cut to" in project.make("validate", "encode-text")["encode-text"].stderr) is cut


def test_embedding_that_is_not_finite_is_refused_and_not_stored(own_model: Project) -> None:
    undefined(own_model.root / "model" / "text_encoder" / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    before = listing(own_model.store / "fragments")
    ran = own_model.run("encode-text")
    assert (ran.code, ran.error) == (3, "embeddings.not_finite")
    assert ran.result["error"]["where"].startswith("text '")
    assert listing(own_model.store / "fragments") == before


def test_damaged_text_encoder_is_refused(own_model: Project) -> None:
    truncate(own_model.root / "model" / "text_encoder" / "model.safetensors")
    assert own_model.run("encode-text").code == 4
