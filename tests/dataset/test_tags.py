from __future__ import annotations

from collections import Counter

from schemas.validate import Tags
from stages.dataset.tags import tag_variants

TEXT = "one, two ,three,, four five"
TAGS = ["one", "two", "three", "four five"]


def split(variants: tuple[str, ...]) -> list[list[str]]:
    return [variant.split(", ") for variant in variants]


def test_shuffle_keeps_every_tag_and_the_first_ones_in_place() -> None:
    found = split(tag_variants(TEXT, Tags(variants=8, keep_first=1), ""))
    assert len(found) > 3
    assert all(sorted(tags) == sorted(TAGS) and tags[0] == "one" for tags in found)
    assert len({tags[0] for tags in split(tag_variants(TEXT, Tags(variants=8), ""))}) > 1


def test_dropout_leaves_out_its_share_and_never_everything() -> None:
    text = ",".join(f"tag{number}" for number in range(40))
    found = split(tag_variants(text, Tags(variants=64, shuffle=False, dropout=0.25, keep_first=2), ""))
    # 64 variants of 38 tags: five standard deviations are 0.044.
    assert abs(sum(40 - len(tags) for tags in found) / (64 * 38) - 0.25) < 0.044
    assert all(tags[:2] == ["tag0", "tag1"] for tags in found)
    assert all(sorted(tags, key=lambda tag: int(tag[3:])) == tags for tags in found)
    single = tag_variants("a, b", Tags(variants=64, dropout=0.99), "")
    assert set(single) <= {"a", "b", "a, b", "b, a"}
    assert "" not in single


def test_tag_with_the_trigger_is_never_left_out() -> None:
    text = "red, [trigger], zorb blue, green"
    found = split(tag_variants(text, Tags(variants=64, dropout=0.9), "zorb"))
    assert all({"[trigger]", "zorb blue"} <= set(tags) for tags in found)
    assert 0 < sum("green" in tags for tags in found) < len(found)


def test_variants_depend_on_seed_and_caption_alone() -> None:
    tags = Tags(variants=4)
    assert tag_variants(TEXT, tags, "") == tag_variants(TEXT, tags, "zorb")
    assert tag_variants(TEXT, tags, "") == tag_variants(TEXT, Tags(variants=8), "")[:4]
    assert tag_variants(TEXT, tags, "") != tag_variants(TEXT, Tags(variants=4, seed=1), "")


def test_equal_variants_come_once() -> None:
    assert tag_variants("one", Tags(variants=8), "") == ("one",)
    assert Counter(tag_variants("a, b", Tags(variants=64), "")) == {"a, b": 1, "b, a": 1}


def test_separator_is_kept_with_a_space_where_it_has_none() -> None:
    assert tag_variants("a;b", Tags(separator=";", variants=1, shuffle=False), "") == ("a; b",)
    assert tag_variants("a\nb", Tags(separator="\n", variants=1, shuffle=False), "") == ("a\nb",)


def test_variants_are_the_same_on_every_machine() -> None:
    # Recorded once: a change here encodes every caption anew.
    assert tag_variants("a, b, c, d", Tags(variants=2, dropout=0.3), "") == ("a, b, d", "c, a")
