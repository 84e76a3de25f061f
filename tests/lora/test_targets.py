from __future__ import annotations

import pytest

from schemas.adapter import DoRA, LoKr, LoRA, Override
from schemas.errors import BadConfig
from schemas.train import Train
from stages.flux2.variants import DEV, KLEIN_4B, KLEIN_9B, TransformerConfig
from stages.lora.targets import linear_shapes, portability, resolve, saved_rank, sizes
from tests.golden.tiny import KLEIN


@pytest.mark.parametrize(
    ("config", "modules", "per_rank"),
    [
        (KLEIN_4B, 80, 1_443_840),
        (KLEIN_9B, 112, 2_588_672),
        (DEV, 160, 6_094_848),
    ],
)
def test_blocks_are_every_linear_of_both_kinds_of_block(
    config: TransformerConfig, modules: int, per_rank: int
) -> None:
    names = resolve(config, "blocks")
    assert len(names) == modules
    assert sum(sum(linear_shapes(config)[name]) for name in names) == per_rank


def test_attention_leaves_out_the_mlps_of_double_blocks() -> None:
    names = resolve(KLEIN, "attention")
    assert set(resolve(KLEIN, "blocks")) - set(names) == {
        f"double_blocks.{index}.{stream}_mlp.{layer}"
        for index in range(2)
        for stream in ("img", "txt")
        for layer in (0, 2)
    }


def test_patterns_choose_by_name_in_the_order_of_the_forward_pass() -> None:
    names = resolve(KLEIN, ("single_blocks.1.*", "double_blocks.0.img_attn.*"))
    assert names == [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_attn.proj",
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
    ]


def test_every_pattern_that_matches_nothing_is_named_with_its_neighbours() -> None:
    with pytest.raises(BadConfig) as caught:
        resolve(
            KLEIN,
            ("double_blocks.0.img_attn.qvk", "single_blocks.*", "single_stream_modulation.lin", "time_in*"),
        )
    faults = caught.value.faults
    assert [fault.code for fault in faults] == ["train.no_such_target"] * 3
    assert "double_blocks.0.img_attn.qkv" in faults[0].why
    assert "never adapted" in faults[1].why


def test_regular_expression_chooses_by_the_whole_name_and_mixes_with_shell_patterns() -> None:
    names = resolve(KLEIN, (r"re:double_blocks\.[01]\.(img|txt)_attn\.proj", "single_blocks.1.*"))
    assert names == [
        *(f"double_blocks.{index}.{stream}_attn.proj" for index in range(2) for stream in ("img", "txt")),
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
    ]
    assert resolve(KLEIN, (r"re:single_blocks\.\d\.linear1",)) == [
        "single_blocks.0.linear1",
        "single_blocks.1.linear1",
    ]
    with pytest.raises(BadConfig, match="matches none"):
        resolve(KLEIN, ("re:linear1",))


def test_regular_expressions_exclude_and_override_as_they_choose() -> None:
    overrides = (Override(pattern=r"re:.*\.0\.linear[12]", rank=2, alpha=1.0),)
    found = sizes(KLEIN, Train(rank=4, alpha=2.0, exclude=(r"re:double_blocks\..+",), overrides=overrides))
    assert found == {
        "single_blocks.0.linear1": (2, 1.0),
        "single_blocks.0.linear2": (2, 1.0),
        "single_blocks.1.linear1": (4, 2.0),
        "single_blocks.1.linear2": (4, 2.0),
    }


def test_every_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(BadConfig) as caught:
        resolve(KLEIN, ("re:(", "re:nothing", "*"), exclude=("re:a{99999999999999}", "*.qkv"))
    found = [(fault.code, fault.where, fault.what.split()[2]) for fault in caught.value.faults]
    assert found == [
        ("train.bad_pattern", "train.targets", "re:("),
        ("train.no_such_target", "train.targets", "re:nothing"),
        ("train.bad_pattern", "train.exclude", "re:a{99999999999999}"),
    ]
    assert "position 0" in caught.value.faults[0].why
    with pytest.raises(BadConfig, match=r"re:\* is no regular expression.*train\.overrides"):
        sizes(KLEIN, Train(overrides=(Override(pattern="re:*", rank=2, alpha=1.0),)))


def test_no_targets_at_all_is_refused() -> None:
    with pytest.raises(BadConfig, match="empty"):
        resolve(KLEIN, ())


def test_all_adds_what_is_safe_outside_the_blocks_in_the_order_of_the_forward_pass() -> None:
    names = resolve(KLEIN, "all")
    assert names[:2] == ["img_in", "txt_in"]
    assert names[2:-1] == resolve(KLEIN, "blocks")
    assert names[-1] == "final_layer.linear"
    assert linear_shapes(KLEIN)["final_layer.linear"] == (8, 32)


def test_excluded_linears_are_left_out() -> None:
    names = resolve(KLEIN, "blocks", exclude=("*.qkv", "double_blocks.1.*"))
    assert set(resolve(KLEIN, "blocks")) - set(names) == {
        name for name in resolve(KLEIN, "blocks") if name.endswith("qkv") or name.startswith("double_blocks.1.")
    }


def test_an_exclusion_of_nothing_or_of_everything_is_refused() -> None:
    with pytest.raises(BadConfig) as caught:
        resolve(KLEIN, "attention", exclude=("double_blocks.*_mlp.*", "*.qkv"))
    (fault,) = caught.value.faults
    assert (fault.code, fault.where) == ("train.no_such_target", "train.exclude")
    with pytest.raises(BadConfig, match=r"train\.exclude leaves none"):
        resolve(KLEIN, "attention", exclude=("*",))


def test_sizes_are_those_of_the_last_override_that_matches() -> None:
    overrides = (Override(pattern="*.linear*", rank=2, alpha=1.0), Override(pattern="*.1.linear1", rank=8, alpha=4.0))
    found = sizes(KLEIN, Train(rank=4, alpha=2.0, overrides=overrides))
    assert list(found) == resolve(KLEIN, "blocks")
    assert found["double_blocks.1.img_attn.qkv"] == (4, 2.0)
    assert found["single_blocks.1.linear2"] == (2, 1.0)
    assert found["single_blocks.1.linear1"] == (8, 4.0)


def test_overrides_of_what_is_not_a_target_are_refused() -> None:
    overrides = (Override(pattern="double_blocks.0.img_mlp.*", rank=2, alpha=1.0),)
    with pytest.raises(BadConfig, match=r"train\.overrides"):
        sizes(KLEIN, Train(targets="attention", overrides=overrides))


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (Train(rank=16), []),
        (Train(rank=48), ["rank 48 is"]),
        (
            Train(rank=48, overrides=(Override(pattern="*0.img_attn.qkv", rank=6, alpha=1.0),)),
            ["rank 6 ", "rank 48 "],
        ),
        (Train(rank=48, overrides=(Override(pattern="*", rank=16, alpha=16.0),)), []),
        (Train(rank=48, targets=("single_blocks.*",)), []),
        (Train(targets="all"), ["img_in, txt_in, final_layer.linear: mflux and the Swift app"]),
        (Train(adapter=DoRA(), rank=6), ["DoRA: diffusers drops"]),
        (Train(adapter=LoKr(), rank=6), ["LoKr: ComfyUI and diffusers read it"]),
    ],
)
def test_programs_that_cannot_show_the_lora_are_named(settings: Train, lines: list[str]) -> None:
    found = portability(settings.adapter, sizes(KLEIN, settings))
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_the_saved_rank_is_that_of_the_file() -> None:
    assert [saved_rank(Train(rank=4, adapter=each)) for each in (LoRA(), LoRA(init="pissa"), DoRA())] == [4, 8, 4]
