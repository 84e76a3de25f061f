"""Packed linears: their products and gradients, that no unpacked matrix outlives its product, how they are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from schemas.quantize import Quantize
from stages.flux2 import quantize
from stages.flux2.packing import FORMATS, Format
from stages.flux2.quantize import FrozenLinear, fill, held_as, packed, unpacked
from tests.flux2 import loading
from tests.golden import tiny

FORMS = list(FORMATS.values())
# Relative error of a normal matrix, rms: measured 0.0085, 0.091, 0.027, 0.117, 0.096.
ROUNDING = {"8bit": 0.01, "4bit": 0.1, "mxfp8": 0.03, "mxfp4": 0.13, "nvfp4": 0.11}


# Half of klein 4B's width and a few of its blocks: 390 MB. `loading.py` measures any size.
SIZE = (12, 1, 4)


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of that size, gone afterwards."""
    path = loading.file_of(tmp_path_factory.mktemp("loadable"), SIZE)
    yield path
    path.unlink()


class Net(nn.Module):
    """A stack of square linears as a model has them: inside blocks, and one outside."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.single_blocks = [{"linear1": nn.Linear(width, width, bias=False)} for _ in range(depth)]
        self.img_in = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.single_blocks:
            x = x + nn.silu(block["linear1"](x))
        return self.img_in(x)


def matrix(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) / shape[-1] ** 0.5


def linear(form: Format, weight: mx.array) -> FrozenLinear:
    layer = FrozenLinear(
        weight.shape[1], weight.shape[0], bias=False, group_size=form.group_size, bits=form.bits, mode=form.mode
    )
    layer.load_weights(list(zip(form.parts, packed(weight, form), strict=True)))
    return layer


def net(depth: int, width: int, form: Format | None) -> Net:
    tensors = [(f"single_blocks.{i}.linear1.weight", matrix(i, width, width)) for i in range(depth)]
    wanted = {} if form is None else {f"single_blocks.{i}.linear1": form for i in range(depth)}
    whole = [*tensors, ("img_in.weight", matrix(depth, width, width))]
    return fill(Net(depth, width), whole, mx.float32, found={}, wanted=wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_product_and_gradient_are_those_of_the_unpacked_matrix(form: Format, dtype: mx.Dtype) -> None:
    layer, x = linear(form, matrix(1, 96, 128)), matrix(2, 3, 5, 128).astype(dtype)
    weight = unpacked(packed(matrix(1, 96, 128), form), form, dtype)
    plain, found = (
        mx.value_and_grad(lambda x, f=f: mx.square(f(x)).sum())(x) for f in (lambda x: x @ weight.T, layer)
    )
    assert layer(x).dtype == dtype
    assert [mx.array_equal(left, right).item() for left, right in zip(plain, found, strict=True)] == [True, True]
    assert layer.trainable_parameters() == {}


@pytest.mark.parametrize(("name", "form"), FORMATS.items())
def test_rounding_is_that_of_the_format(name: str, form: Format) -> None:
    weight = matrix(1, 256, 256)
    found = tiny.distance(unpacked(packed(weight, form), form, mx.float32), weight)
    assert ROUNDING[name] / 2 < found < ROUNDING[name]


@pytest.mark.parametrize("form", FORMS)
def test_matrix_is_packed_in_blocks_as_in_one(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(1, 50, 128)
    whole = mx.quantize(weight.astype(mx.bfloat16), form.group_size, form.bits, mode=form.mode)
    monkeypatch.setattr(quantize, "BLOCK_NUMBERS", 128 * 7)
    assert all(mx.array_equal(*pair).item() for pair in zip(packed(weight, form), whole, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_of_metal_gives_the_same(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(form, matrix(1, 96, 128)), matrix(2, 5, 128)
    expected = layer(x)
    monkeypatch.setattr(quantize, "_has_fast_kernel", lambda: True)
    # The kernel does not round the unpacked matrix to bfloat16.
    assert tiny.error(layer(x), expected) < 0.01


def plainly(gradient: Callable) -> Callable:
    return gradient


@pytest.mark.parametrize("how", [plainly, mx.compile])
def test_no_unpacked_matrix_outlives_its_product(how: Callable) -> None:
    depth, width = 24, 512
    model, x = net(depth, width, FORMATS["4bit"]), matrix(9, 32, width)
    gradient = how(mx.grad(lambda x: mx.square(model(x)).sum()))
    mx.eval(gradient(x))  # traced and loaded
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x))
    matrices = (mx.get_peak_memory() - before) / (4 * width * width)
    # Half of them are what MLX needs on the CPU to unpack one; kept until the backward pass they would be 24 more.
    assert matrices < 14


def test_checkpointing_and_compiling_change_no_gradient() -> None:
    model, x = net(3, 128, FORMATS["4bit"]), matrix(9, 4, 128)

    def value(x: mx.array) -> mx.array:
        return mx.square(model(x)).sum()

    plain = mx.grad(value)(x)
    for other in (
        mx.grad(mx.checkpoint(value)),
        mx.compile(mx.grad(value)),
        mx.compile(mx.grad(mx.checkpoint(value))),
    ):
        assert tiny.error(other(x), plain) < 1e-6


def test_only_what_is_wanted_is_packed() -> None:
    model = net(2, 128, FORMATS["nvfp4"])
    assert [type(block["linear1"]) for block in model.single_blocks] == [FrozenLinear, FrozenLinear]
    assert type(model.img_in) is nn.Linear
    assert held_as(model) == "nvfp4"
    assert held_as(net(1, 128, None)) == "none"
    assert held_as(net(1, 128, Format("affine", 3, 32))) == "affine, 3 bits, groups of 32"


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_packed_is_taken_as_it_is_or_unpacked(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    first = net(1, 128, form)
    tensors = tree_flatten(first.parameters())
    inside, outside = packed(matrix(3, 128, 128), form), f"img_in.{form.parts[0]}"
    given = [pair for pair in tensors if pair[0] != outside]
    given += [(f"img_in.{part}", array) for part, array in zip(form.parts, inside, strict=True)]
    found = {"single_blocks.0.linear1": form, "img_in": form}
    monkeypatch.setattr(quantize, "BLOCK_NUMBERS", 128 * 7)
    second = fill(Net(1, 128), given, mx.float32, found=found, wanted={"single_blocks.0.linear1": form})
    block = second.single_blocks[0]["linear1"]
    assert all(mx.array_equal(block[part], first.single_blocks[0]["linear1"][part]).item() for part in form.parts)
    assert mx.array_equal(second.img_in.weight, unpacked(inside, form, mx.float32)).item()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["8bit", "4bit"])
def test_loading_peaks_near_the_packed_size(loadable: Path, form: Quantize) -> None:
    found = loading.measured(loadable, SIZE, form)
    assert found["held"] < 0.65 * found["file"]
    assert found["peak"] - found["before"] <= 1.15 * found["held"] + found["largest"]


def test_scales_of_other_types_become_bfloat16() -> None:
    form = FORMATS["4bit"]
    parts = mx.quantize(matrix(0, 128, 128), form.group_size, form.bits, mode=form.mode)  # float32 scales
    given = [(f"single_blocks.0.linear1.{part}", array) for part, array in zip(form.parts, parts, strict=True)]
    names = {"single_blocks.0.linear1": form}
    model = fill(Net(1, 128), [*given, ("img_in.weight", matrix(1, 128, 128))], mx.float32, found=names, wanted=names)
    assert {array.dtype for name, array in tree_flatten(model.single_blocks[0]) if "weight" not in name} == {
        mx.bfloat16
    }
