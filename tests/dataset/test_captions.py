from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import RejectedInput
from stages.dataset.captions import (
    MAX_CAPTION_BYTES,
    MOST_CAPTIONS,
    Captions,
    caption_id,
    decode_text,
    prompt_with_trigger,
    read_captions,
    with_class_word,
    with_trigger,
)
from stages.dataset.discover import discover
from stages.dataset.metadata import MAX_LINE_BYTES
from tests.dataset.corpus import write


def read(folder: Path, *, allow_empty: bool = False, lines: bool = False) -> Captions:
    return read_captions(folder, discover(folder), allow_empty=allow_empty, lines=lines)


def faults(folder: Path) -> list[tuple[str, str]]:
    return [(fault.code, fault.where) for fault in read(folder).faults]


def rejection(data: bytes) -> str:
    with pytest.raises(RejectedInput) as caught:
        decode_text(data, "a.txt")
    return str(caught.value)


def test_sidecars_of_all_three_kinds_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.png": "", "a.txt": "one", "b.jpg": "", "b.CAPTION": "two", "c.webp": "", "c.json": '{"prompt": "three"}'},
    )
    assert read(tmp_path).texts == {"a.png": ("one",), "b.jpg": ("two",), "c.webp": ("three",)}


def test_byte_order_mark_crlf_and_ends_go_and_nothing_else_changes() -> None:
    assert decode_text(b"\xef\xbb\xbf  one\r\ntwo \t\n", "a.txt") == "one\ntwo"
    decomposed = "cafe\u0301 {placeholder} %s $(x) <|im_end|> \u202egpj \t\r\u05d0"
    assert decode_text(decomposed.encode(), "a.txt") == decomposed


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"ab\xff", "byte 2 is 0xff"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"a\0b", "caption.nul"),
        (b"a \x1b[31mred", "caption.control] the caption holds a control character (a.txt): '\\x1b' at character 2"),
        ("a\u009b2J".encode(), "caption.control"),
        (b"a\x7f", "caption.control"),
        (b"\xed\xa0\x80", "byte 0"),
        (b"x" * (MAX_CAPTION_BYTES + 1), f"at most {MAX_CAPTION_BYTES} bytes"),
    ],
)
def test_text_that_cannot_be_trusted_is_refused_with_its_place(data: bytes, expected: str) -> None:
    assert expected in rejection(data)


def test_missing_empty_and_blank_captions_are_faults_unless_allowed(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "b.png": "", "b.txt": "", "c.png": "", "c.txt": " \r\n\t"})
    assert faults(tmp_path) == [("caption.missing", "a.png"), ("caption.empty", "b.txt"), ("caption.empty", "c.txt")]
    allowed = read(tmp_path, allow_empty=True)
    assert (allowed.texts, allowed.faults) == ({"a.png": ("",), "b.png": ("",), "c.png": ("",)}, [])


def test_two_captions_for_one_picture_are_a_fault_naming_both(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "a.caption": "y"})
    (fault,) = read(tmp_path).faults
    assert (fault.code, fault.why) == ("caption.ambiguous", "in a.caption and a.txt")


def test_two_pictures_with_one_sidecar_are_ambiguous_and_take_no_caption(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": "", "a.png": "", "a.txt": "x"})
    captions = read(tmp_path)
    assert [(fault.code, fault.why) for fault in captions.faults] == [("picture.ambiguous", "a.jpg and a.png")]
    assert captions.texts == {}


def test_sidecar_spelled_in_another_normal_form_still_belongs_to_its_picture(tmp_path: Path) -> None:
    write(tmp_path, {"e\u0301.png": "", "\u00e9.txt": "x"})
    assert list(read(tmp_path).texts.values()) == [("x",)]


@pytest.mark.parametrize("length", [1, MAX_CAPTION_BYTES, MAX_LINE_BYTES - 100])
def test_json_of_another_tool_beside_a_caption_is_left_alone(tmp_path: Path, length: int) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "a.json": f'{{"workflow": "{"x" * length}"}}'})
    captions = read(tmp_path)
    assert (captions.texts, captions.faults) == ({"a.png": ("x",)}, [])


@pytest.mark.parametrize("letter", ["x", "é", "猫"])
@pytest.mark.parametrize(("name", "most_bytes"), [("a.txt", MAX_CAPTION_BYTES), ("a.json", MAX_LINE_BYTES)])
def test_file_beyond_the_limit_is_called_too_long_whatever_its_letters(
    tmp_path: Path, name: str, most_bytes: int, letter: str
) -> None:
    write(tmp_path, {"a.png": "", name: '{"text": "' + letter * (most_bytes // len(letter.encode()) + 5)})
    (fault,) = read(tmp_path).faults
    assert (fault.code, fault.where) == ("caption.too_long", name)
    assert str(most_bytes) in fault.why
    assert "shorten" in fault.fix


def test_stray_caption_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "gone.txt": "y"})
    assert read(tmp_path).warnings == ["1 caption files belong to no picture: gone.txt"]


def test_huge_caption_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": ""})
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(50_000_000_000)
    assert faults(tmp_path) == [("caption.too_long", "a.txt")]


def test_table_rows_caption_pictures_relative_to_the_table(tmp_path: Path) -> None:
    rows = '{"file_name": "1.png", "text": "one"}\n\n{"file_name": "deep/2.png", "caption": "two", "width": 4}\r\n'
    table = 'file_name,prompt\n3.png,"three, with\na line"\n'
    write(tmp_path, {"set/1.png": "", "set/deep/2.png": "", "set/metadata.jsonl": rows})
    write(tmp_path, {"other/3.png": "", "other/metadata.csv": table})
    captions = read(tmp_path)
    assert captions.faults == []
    assert captions.texts == {
        "set/1.png": ("one",),
        "set/deep/2.png": ("two",),
        "other/3.png": ("three, with\na line",),
    }


def test_list_in_json_holds_several_captions_each_once(tmp_path: Path) -> None:
    row = '{"file_name": "a.png", "text": ["one ", "two\\nlines", "", "one"]}'
    write(tmp_path, {"a.png": "", "metadata.jsonl": row, "b.png": "", "b.json": '{"caption": ["three", "four"]}'})
    captions = read(tmp_path)
    assert (captions.texts, captions.faults) == ({"a.png": ("one", "two\nlines"), "b.png": ("three", "four")}, [])


@pytest.mark.parametrize(
    ("texts", "code"), [("[]", "caption.empty"), ('[" "]', "caption.empty"), ('["\\u0000"]', "caption.nul")]
)
def test_list_without_a_good_caption_is_a_fault(tmp_path: Path, texts: str, code: str) -> None:
    write(tmp_path, {"a.png": "", "metadata.jsonl": f'{{"file_name": "a.png", "text": {texts}}}'})
    assert faults(tmp_path) == [(code, "metadata.jsonl line 1")]


def test_lines_are_captions_of_their_own_only_where_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "one\r\n \n two\none\n", "b.png": "", "b.txt": "three"})
    assert read(tmp_path).texts == {"a.png": ("one\n \n two\none",), "b.png": ("three",)}
    assert read(tmp_path, lines=True).texts == {"a.png": ("one", "two"), "b.png": ("three",)}


def test_more_captions_than_a_person_writes_are_a_fault(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "\n".join(map(str, range(MOST_CAPTIONS + 1)))})
    (fault,) = read(tmp_path, lines=True).faults
    assert (fault.code, fault.where) == ("caption.too_many", "a.txt")


def test_duplicate_rows_are_a_fault_naming_both_lines(tmp_path: Path) -> None:
    row = '{"file_name": "a.png", "text": "x"}\n'
    write(tmp_path, {"a.png": "", "metadata.jsonl": row * 2})
    (fault,) = read(tmp_path).faults
    assert fault.why == "in metadata.jsonl line 1 and metadata.jsonl line 2"


def test_row_without_its_picture_is_a_fault_even_when_the_path_climbs_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "metadata.csv": "file_name,text\nb.png,y\n../../etc/passwd,z\n"})
    expected = [("caption.no_picture", "metadata.csv line 2"), ("caption.no_picture", "metadata.csv line 3")]
    assert faults(tmp_path) == expected


def test_trigger_is_replaced_else_kept_as_a_word_else_put_in_front() -> None:
    assert with_trigger("a [trigger] on a [trigger]", "zorb") == "a zorb on a zorb"
    assert with_trigger("one zorb, red", "zorb") == "one zorb, red"
    assert with_trigger("two zorbs", "zorb") == "zorb two zorbs"
    assert with_trigger("a Zorb", "zorb") == "zorb a Zorb"
    assert with_trigger("", "zorb") == "zorb"
    assert with_trigger("a cat", "") == "a cat"
    assert with_trigger("a c++ cup", "c++") == "a c++ cup"


def test_prompts_only_have_the_trigger_replaced() -> None:
    assert prompt_with_trigger("a [trigger]", "zorb") == "a zorb"
    assert prompt_with_trigger("a cat", "zorb") == "a cat"


def test_the_class_word_stands_wherever_the_trigger_stood() -> None:
    assert with_class_word("zorb, two zorbs and a car", "zorb", "cat") == "cat, two cats and a car"


def test_caption_id_is_the_first_half_of_the_sha256() -> None:
    assert caption_id("") == "e3b0c44298fc1c149afbf4c8996fb924"
