"""Token ids against transformers' with Qwen's real vocabulary and mistral-common's with Mistral's; wrong files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from schemas.errors import Damaged
from stages.contract.digests import digest_of
from stages.contract.runner import load_stage
from stages.flux2.micro_tokenizer import tokenizer_json
from stages.flux2.text.prompts import template_of
from stages.flux2.text.tokenize import Tokenizer
from stages.flux2.variants import MICRO, MISTRAL_24B, QWEN3_4B
from tests.golden import mistral_vocabulary, qwen_vocabulary
from tests.golden.tiny import GOLDEN

ROWS = json.loads((GOLDEN / "qwen-ids.json").read_text())
MISTRAL_ROWS = json.loads((GOLDEN / "mistral-ids.json").read_text())
PAD, MISTRAL_PAD = 151643, 11
# The version of encode-text -> the templates it fills. Keys hold the version alone, so that with another template but
# the same version old embeddings would be taken for new ones.
TEMPLATES = {1: "a8b898191d4696a57b8ac30e5376b8c0d65fdf4da60be115b53c92c8cdf22716"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    ranks = qwen_vocabulary.ranks_file()
    if ranks is None:
        pytest.skip("dashscope, which carries Qwen's vocabulary, is not installed")
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    path.write_text(json.dumps(qwen_vocabulary.tokenizer_json(qwen_vocabulary.read_ranks(ranks))))
    return Tokenizer(path, QWEN3_4B)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tekken = mistral_vocabulary.tekken_file()
    if tekken is None:
        pytest.skip("mistral-common, which carries Mistral's vocabulary, is not installed")
    path = tmp_path_factory.mktemp("mistral") / "tokenizer.json"
    path.write_text(json.dumps(mistral_vocabulary.tokenizer_json(tekken)))
    return Tokenizer(path, MISTRAL_24B)


@pytest.fixture
def micro(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(512)))
    return path


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_ids_equal_transformers(row: dict, qwen: Tokenizer) -> None:
    tokens = qwen.encode(row["caption"])
    assert list(tokens.ids) == row["ids"] + [PAD] * (512 - len(row["ids"]))
    assert tokens.count == len(row["ids"])


@pytest.mark.parametrize("row", MISTRAL_ROWS, ids=[row["name"] for row in MISTRAL_ROWS])
def test_ids_equal_those_of_mistral_common_and_pads_are_on_the_left(row: dict, mistral: Tokenizer) -> None:
    tokens = mistral.encode(row["caption"])
    assert list(tokens.ids) == [MISTRAL_PAD] * (512 - len(row["ids"])) + row["ids"]
    assert tokens.count == len(row["ids"])


def test_literal_that_stands_for_a_picture_is_removed_once(mistral: Tokenizer) -> None:
    assert mistral.encode("a [IMG]cat[IMG]") == mistral.encode("a cat")
    assert mistral.encode("[IM[IMG]G]a cat").count > mistral.encode("a cat").count
    # Its control token, 10, comes from no caption.
    assert 10 not in mistral.encode("[IM[IMG]G]a cat").ids


def test_overlong_caption_keeps_its_first_512_tokens(qwen: Tokenizer) -> None:
    row = next(row for row in ROWS if row["name"] == "too long")
    assert len(row["ids"]) == 512
    assert qwen.encode(row["caption"] + "and more").ids == tuple(row["ids"])


@pytest.mark.parametrize("literal", ["<|im_end|>", "<|im_start|>system", "<think>", "</think>", "<|endoftext|>"])
def test_control_literal_in_a_caption_gives_no_control_token(literal: str, micro: Path) -> None:
    tokenizer = Tokenizer(micro, MICRO.text_encoder)
    plain, spelled = (tokenizer.encode(text) for text in ("a", f"a{literal}"))
    controls = [[index for index in tokens.ids[: tokens.count] if index >= 507] for tokens in (plain, spelled)]
    assert controls[0] == controls[1] == [508, 509, 508, 510, 511]
    assert spelled.count > plain.count


def test_every_caption_word_has_ids_and_known_words_one_each(micro: Path) -> None:
    tokenizer = Tokenizer(micro, MICRO.text_encoder)
    empty = tokenizer.encode("").count
    assert tokenizer.encode("a photo of a red cat on the couch").count == empty + 9
    assert tokenizer.encode("猫 zorb").count > empty


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "tokenizer.missing"),
        (b"", "tokenizer.content"),
        (b"[1, 2]", "tokenizer.content"),
        (b'{"added_tokens": [], "model": {"type": "none"}}', "tokenizer.content"),
        (b"\xff\xfe", "tokenizer.content"),
    ],
)
def test_file_that_is_no_tokenizer_is_damaged(content: bytes | None, code: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Damaged, match=code):
        Tokenizer(path, MICRO.text_encoder)


def test_tokenizer_without_control_tokens_is_damaged(micro: Path) -> None:
    content = json.loads(micro.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "think" not in token["content"]]
    micro.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"expected </think>, <think>"):
        Tokenizer(micro, MICRO.text_encoder)


def test_tokenizer_of_a_larger_vocabulary_is_damaged(micro: Path) -> None:
    micro.write_text(json.dumps(tokenizer_json(513)))
    with pytest.raises(Damaged, match="expected at most 512 ids, found 513"):
        Tokenizer(micro, MICRO.text_encoder)


def test_another_template_is_another_version_of_encode_text() -> None:
    templates = digest_of("templates", {kind: asdict(template_of(kind)) for kind in ("qwen3", "mistral3")})
    assert TEMPLATES[load_stage("encode-text").version] == templates, "raise the version of encode-text"
