from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import numpy as reference

from schemas.errors import Damaged, NoResources
from stages.stores import tensors
from stages.stores.tensors import Tensor


def small() -> dict[str, Tensor]:
    """Five tensors of five types, among them an empty and a scalar one."""
    draw = np.random.default_rng(7)
    return {
        "b.weight": Tensor("F32", draw.standard_normal((3, 5)).astype(np.float32)),
        "a.bits": Tensor("BF16", draw.integers(0, 1 << 16, (7,), np.uint16)),
        "a.half": Tensor("F16", draw.standard_normal((2, 2)).astype(np.float16)),
        "step": Tensor("I64", np.array(12, np.int64)),
        "none": Tensor("U8", np.zeros((0, 4), np.uint8)),
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].data.tobytes() == second[name].data.tobytes()
        for name in first
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors.save(tmp_path / "a.safetensors", small(), {"format": "pt"})
    return tmp_path / "a.safetensors"


def test_saved_file_loads_with_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = tensors.save(path, small(), {"z": "1", "a": "é\n"})
    loaded = tensors.load(path, sha256=digest)
    assert same(loaded.tensors, small())
    assert loaded.metadata == {"a": "é\n", "z": "1"}
    assert loaded.sha256 == digest


def test_other_sha256_is_refused(file: Path) -> None:
    with pytest.raises(Damaged) as error:
        tensors.load(file, sha256="0" * 64)
    assert error.value.faults[0].code == "tensors.digest"


def test_order_of_insertion_changes_no_byte(tmp_path: Path) -> None:
    orders = list(itertools.permutations(small().items()))[::17]
    metadata = [("b", "2"), ("a", "1")]
    digests = {
        tensors.save(tmp_path / f"{n}.safetensors", dict(order), dict(metadata[:: 1 - 2 * (n % 2)]))
        for n, order in enumerate(orders)
    }
    assert len(orders) > 5
    assert len(digests) == 1


def test_every_tensor_is_aligned(file: Path) -> None:
    for entry in tensors.read_header(file).entries.values():
        assert entry.start % tensors.DTYPES[entry.dtype].itemsize == 0


def test_reference_library_reads_what_is_written(file: Path) -> None:
    with file.open("rb") as opened:
        loaded = reference.load(opened.read().replace(b'"BF16"', b'"U16" '))
    assert loaded.keys() == small().keys()
    for name, tensor in small().items():
        assert np.array_equal(loaded[name], tensor.data)


def test_what_reference_library_writes_is_read(tmp_path: Path) -> None:
    arrays = {name: tensor.data for name, tensor in small().items() if tensor.dtype != "BF16"}
    reference.save_file(arrays, tmp_path / "r.safetensors", {"format": "np"})
    loaded = tensors.load(tmp_path / "r.safetensors")
    assert loaded.metadata == {"format": "np"}
    assert same(loaded.tensors, {name: small()[name] for name in arrays})


def test_mlx_reads_what_is_written_and_the_reverse(tmp_path: Path, file: Path) -> None:
    arrays = mx.load(str(file))
    mx.eval(arrays)
    mx.save_safetensors(str(tmp_path / "m.safetensors"), arrays, {"format": "pt"})
    assert same(tensors.load(tmp_path / "m.safetensors").tensors, small())


def test_mlx_round_trip_keeps_bits() -> None:
    for tensor in small().values():
        back = tensors.from_mlx(tensors.to_mlx(tensor))
        assert same({"x": back}, {"x": tensor})


def test_mlx_cast_rounds_as_asked() -> None:
    tensor = Tensor("F32", np.array([1.0, 1.0 + 2**-12], np.float32))
    array = tensors.to_mlx(tensor, mx.bfloat16)
    assert array.dtype == mx.bfloat16
    assert array.tolist() == [1.0, 1.0]


def test_transposed_mlx_array_keeps_its_values() -> None:
    array = mx.arange(6, dtype=mx.bfloat16).reshape(2, 3).T
    assert same({"x": tensors.from_mlx(array)}, {"x": tensors.from_mlx(mx.array(array.tolist(), mx.bfloat16))})


@pytest.mark.parametrize("tag", ["F8_E4M3", "F8_E5M2", "F64"])
def test_types_mlx_would_alter_are_refused(tag: str) -> None:
    with pytest.raises(Damaged) as error:
        tensors.to_mlx(Tensor(tag, np.zeros(4, tensors.DTYPES[tag])))
    assert error.value.faults[0].code == "tensors.dtype"


def test_existing_path_is_never_written(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        tensors.save(file, {}, {})
    assert file.read_bytes() == before


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        tensors.save(tmp_path / "x.safetensors", {"x": Tensor("F32", np.zeros(3, np.float16))}, {})
    assert list(tmp_path.iterdir()) == []


def test_open_file_reads_tensor_by_tensor(file: Path) -> None:
    with tensors.open_tensors(file) as opened:
        assert same({name: opened.read(name) for name in opened.header.entries}, small())


def test_digest_ignores_the_file_and_order_but_no_value() -> None:
    digest = tensors.tensor_digest(small())
    assert tensors.tensor_digest(dict(reversed(small().items()))) == digest
    renamed = {name.replace("step", "stop"): tensor for name, tensor in small().items()}
    reshaped = small() | {"b.weight": Tensor("F32", small()["b.weight"].data.reshape(5, 3))}
    retyped = small() | {"a.bits": Tensor("U16", small()["a.bits"].data)}
    changed = small() | {"step": Tensor("I64", np.array(13, np.int64))}
    others = {tensors.tensor_digest(other) for other in (renamed, reshaped, retyped, changed)}
    assert len(others | {digest}) == 5


def test_400_bit_flips_are_all_caught(file: Path) -> None:
    digest = tensors.load(file).sha256
    good = file.read_bytes()
    draw = random.Random(3)
    caught = 0
    for position in draw.sample(range(len(good) * 8), 400):
        flipped = bytearray(good)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(Damaged):
            tensors.load(file, sha256=digest)
        caught += 1
    assert caught == 400


def test_every_truncation_is_caught_by_the_header_alone(file: Path) -> None:
    good = file.read_bytes()
    for size in range(len(good)):
        file.write_bytes(good[:size])
        with pytest.raises(Damaged) as error:
            tensors.read_header(file)
        assert error.value.faults[0].code == "tensors.truncated"


def read_while(file: Path, disturb: Callable[[], None]) -> None:
    with tensors.open_tensors(file) as opened:
        opened.read("none")
        disturb()
        for name in opened.header.entries:
            opened.read(name)


def test_file_cut_after_opening_is_an_error_not_zeros(file: Path) -> None:
    size = file.stat().st_size
    with pytest.raises(Damaged) as error:
        read_while(file, lambda: os.truncate(file, size - 8))
    assert error.value.faults[0].code == "tensors.truncated"


def test_file_rewritten_while_open_is_an_error(file: Path) -> None:
    other = bytes(file.stat().st_size)
    with pytest.raises(Damaged) as error:
        read_while(file, lambda: (file.write_bytes(other), os.utime(file, ns=(0, 0))))
    assert error.value.faults[0].code == "tensors.changed"


def test_file_replaced_by_rename_while_open_is_read_whole(tmp_path: Path, file: Path) -> None:
    with tensors.open_tensors(file) as opened:
        (tmp_path / "new").write_bytes(bytes(99))
        (tmp_path / "new").replace(file)
        loaded = {name: opened.read(name) for name in opened.header.entries}
    assert same(loaded, small())


def head(text: bytes | str | dict, body: int = 16) -> bytes:
    data = json.dumps(text) if isinstance(text, dict) else text
    data = data.encode() if isinstance(data, str) else data
    return len(data).to_bytes(8, "little") + data + bytes(body)


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = '{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
LIES = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\x08\0\0\0\0\0\0", "truncated"),
    "header over the cap": ((1 << 40).to_bytes(8, "little") + b"{" * 64, "header"),
    "largest header length": (b"\xff" * 8 + b"{}", "header"),
    "header over the file": ((9999).to_bytes(8, "little") + b"{}", "truncated"),
    "not json": (head("{a: 1}"), "header"),
    "not utf-8": (head(b'{"\xff":1}'), "header"),
    "an array": (head("[]"), "header"),
    "trailing text": (head(ONE + "} {}"), "header"),
    "negative offset": (head({"a": entry(offsets=(-16, 0))}), "offsets"),
    "overflowing offset": (head({"a": entry(offsets=(2**64 - 16, 2**64))}), "offsets"),
    "backward offsets": (head({"a": entry(offsets=(16, 0))}), "offsets"),
    "boolean offset": (head({"a": entry(offsets=(False, 16))}), "offsets"),
    "float shape": (head(ONE.replace("[2,2]", "[2.0,2]") + "}"), "header"),
    "nan shape": (head(ONE.replace("[2,2]", "[NaN,2]") + "}"), "header"),
    "overflowing shape": (head({"a": entry(shape=(2**33, 2**33))}), "length"),
    "overflowing shape of nothing": (head({"a": entry(shape=(0, 2**61), offsets=(0, 0))}, body=0), "shape"),
    "negative shape": (head({"a": entry(shape=(-2, -2))}), "shape"),
    "70 dimensions": (head({"a": entry(shape=(1,) * 70)}), "shape"),
    "overlap": (head({"a": entry(), "b": entry()}), "overlap"),
    "hole": (head({"a": entry(offsets=(8, 24))}, body=24), "hole"),
    "trailing bytes": (head({"a": entry()}, body=17), "trailing"),
    "missing bytes": (head({"a": entry()}, body=15), "truncated"),
    "duplicate tensor": (head(ONE + "," + ONE[1:] + "}"), "header"),
    "duplicate field": (head(ONE.replace('"dtype"', '"shape":[4],"dtype"') + "}"), "header"),
    "duplicate metadata": (head('{"__metadata__":{},"__metadata__":{}}', 0), "header"),
    "wider type": (head({"a": entry("F64")}), "length"),
    "narrower type": (head({"a": entry("F16")}), "length"),
    "unknown type": (head({"a": entry("F128")}), "dtype"),
    "type no string": (head({"a": entry(["F32"])}), "dtype"),
    "extra field": (head({"a": entry() | {"file": "../../etc/passwd"}}), "entry"),
    "missing field": (head({"a": {"dtype": "F32", "shape": []}}), "entry"),
    "metadata number": (head({"__metadata__": {"a": 1}}, 0), "metadata"),
    "metadata list": (head({"__metadata__": []}, 0), "metadata"),
    "deep nesting": (head("{" + '"a":[' * 1 + "[" * 200_000), "header"),
    "deep objects": (head('{"a":' * 200_000), "header"),
    "5000-digit number": (head(ONE.replace("16]", "9" * 5000 + "]") + "}"), "header"),
    "name with escape": (head({"\x1b[31m": entry()}), "name"),
    "name with newline": (head({"a\nb": entry()}), "name"),
    "name of 1 MB": (head({"a" * (1 << 20): entry()}), "name"),
    "name empty": (head({"": entry()}), "name"),
    "lone surrogate": (head(ONE.replace('"a"', '"\\ud800"') + "}"), "header"),
    "pickle": (pickle.dumps([{"a": 1}] * 99), "header"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_lies_are_refused_fast_and_small(tmp_path: Path, lie: str) -> None:
    data, code = LIES[lie]
    path = tmp_path / "lie.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(Damaged) as error:
        tensors.load(path)
    seconds = time.perf_counter() - started
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.faults[0].code == f"tensors.{code}"
    assert len(error.value.faults[0].line()) < 3000
    assert "fix:" in str(error.value)
    assert seconds < 1
    assert peak_bytes < 256e6


def test_same_width_type_and_transposed_shape_move_the_digest(file: Path) -> None:
    # A header may lie consistently; only the digest beside the file tells.
    digest = tensors.load(file).sha256
    good = file.read_bytes()
    for lie in (good.replace(b'"F32"', b'"I32"'), good.replace(b"[3,5]", b"[5,3]")):
        assert lie != good
        file.write_bytes(lie)
        tensors.load(file)
        with pytest.raises(Damaged):
            tensors.load(file, sha256=digest)


def test_sparse_giant_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes(head({"a": entry()}))
    os.truncate(path, 1 << 36)
    started = time.perf_counter()
    with pytest.raises(Damaged):
        tensors.load(path)
    assert time.perf_counter() - started < 1


def test_only_regular_safetensors_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({}))
    codes = []
    for name in ("pipe.safetensors", "folder.safetensors", "weights.pt", "absent.safetensors"):
        with pytest.raises(Damaged) as error:
            tensors.read_header(tmp_path / name)
        codes.append(error.value.faults[0].code)
    assert codes == ["tensors.irregular", "tensors.irregular", "tensors.suffix", "tensors.missing"]
    with pytest.raises(NoResources):
        tensors.read_header(tmp_path / "loop.safetensors")


def test_link_into_a_cache_is_followed_for_reading(tmp_path: Path, file: Path) -> None:
    (tmp_path / "blob").write_bytes(file.read_bytes())
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")
    assert same(tensors.load(tmp_path / "link.safetensors").tensors, small())
