from __future__ import annotations

import pytest

from schemas.errors import BadConfig
from stages.flux2.variants import DEV, KLEIN_4B, KLEIN_9B, TransformerConfig
from stages.lora.targets import linear_shapes, resolve
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


def test_no_targets_at_all_is_refused() -> None:
    with pytest.raises(BadConfig, match="empty"):
        resolve(KLEIN, ())
