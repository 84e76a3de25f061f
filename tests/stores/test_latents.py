from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import Damaged, NoResources
from stages.contract.digests import sha256_bytes, sha256_file
from stages.stores.latents import LatentReader, LatentRow, fragment_files, scan_latents, write_latents
from tests.stores.damage import flipped_bits, not_plain_files, other_lengths, zeroed_pages


def latents(count: int, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> list[tuple[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [(f"key-{seed}-{row}", random.standard_normal(shape, dtype=np.float32)) for row in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def rows(store: Path) -> list[LatentRow]:
    return write_latents(store, latents(5), "float32")


def shard_of(store: Path, rows: list[LatentRow]) -> Path:
    return fragment_files(store, rows[0].fragment)[1]


def metadata_of(store: Path, rows: list[LatentRow]) -> Path:
    return fragment_files(store, rows[0].fragment)[0]


def refused(store: Path, rows: list[LatentRow]) -> bool:
    """Whether some row is refused, and every row that is not still reads exactly."""
    expected = dict(latents(5))
    reader, refusals = LatentReader([store]), 0
    for row in rows:
        try:
            assert np.array_equal(reader.read(row), expected[row.latent_key])
        except Damaged:
            refusals += 1
    return refusals > 0


@pytest.mark.parametrize("count", [1, 2, 64, 1024])
def test_float32_latents_come_back_exactly_in_any_order(store: Path, count: int):
    records = latents(count)
    rows = write_latents(store, records, "float32")
    reader = LatentReader([store])
    assert [row.row for row in rows] == list(range(count))
    for row, (key, latent) in reversed(list(zip(rows, records, strict=True))):
        assert row.latent_key == key
        assert row.sha256 == sha256_bytes(latent.tobytes())
        found = reader.read(row)
        assert found.dtype == np.float32
        assert np.array_equal(found, latent)


def test_bfloat16_latents_travel_as_their_bits(store: Path):
    bits = np.arange(60, dtype=np.uint16).reshape(3, 4, 5) * 1091
    (row,) = write_latents(store, [("a", bits)], "bfloat16")
    assert row.dtype == "bfloat16"
    assert (row.channels, row.height, row.width) == (3, 4, 5)
    found = LatentReader([store]).read(row)
    assert found.dtype == np.uint16
    assert np.array_equal(found, bits)


def test_a_latent_of_zeros_is_stored_not_left_out(store: Path):
    (row,) = write_latents(store, [("zero", np.zeros((3, 4, 5), np.float32))], "float32")
    assert shard_of(store, [row]).stat().st_size == 60 * 4 + 4 + 16 + 4
    assert not LatentReader([store]).read(row).any()


def test_plain_zarr_reads_a_fragment(store: Path, rows: list[LatentRow]):
    import zarr

    array = zarr.open_array(store / rows[0].fragment, mode="r")
    assert array.chunks == (1, 3, 4, 5)
    assert array.shards == (5, 3, 4, 5)
    assert array.attrs["dtype"] == "float32"
    assert np.array_equal(array[...], np.stack([latent for _, latent in latents(5)]))


def test_two_stores_hold_the_same_bytes(tmp_path: Path):
    digests = []
    for name in ("one", "two"):
        rows = write_latents(tmp_path / name, latents(5), "float32")
        digests.append([sha256_file(path) for path in fragment_files(tmp_path / name, rows[0].fragment)])
    assert digests[0] == digests[1]


def test_fragment_name_follows_keys_bytes_and_dtype(store: Path):
    (key, latent), other = latents(1)[0], latents(1, seed=1)[0][1]
    bits = latent.view(np.uint16)
    fragments = {
        write_latents(store, records, dtype)[0].fragment
        for records, dtype in [
            ([(key, latent)], "float32"),
            ([("another", latent)], "float32"),
            ([(key, other)], "float32"),
            ([(key, bits)], "bfloat16"),
        ]
    }
    assert len(fragments) == 4


def test_nothing_is_left_in_the_workspace(store: Path, rows: list[LatentRow]):
    assert not list((store / ".tmp").iterdir())


@pytest.mark.parametrize(
    ("records", "dtype"),
    [
        ([], "float32"),
        (latents(1025, (1, 1, 1)), "float32"),
        (latents(1) + latents(1), "float32"),
        (latents(1) + latents(1, (3, 5, 4), seed=1), "float32"),
        (latents(1), "bfloat16"),
        ([("a", np.zeros((3, 4, 5), np.float64))], "float32"),
        ([("a", np.zeros((4, 5), np.float32))], "float32"),
    ],
)
def test_what_is_no_fragment_is_not_written(store: Path, records, dtype):
    with pytest.raises(ValueError, match=r"fragment|records are given"):
        write_latents(store, records, dtype)
    assert not (store / "fragments").exists()


def test_metadata_that_the_disk_does_not_give_back_is_no_fragment(store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zarr.open_array", lambda *_, **__: json.loads(""))
    with pytest.raises(NoResources, match=r"disk\.failed.*cannot be read"):
        write_latents(store, latents(1), "float32")
    assert scan_latents(store) == {}


def test_writing_again_mends_a_damaged_fragment(store: Path, rows: list[LatentRow]):
    shard = shard_of(store, rows)
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    assert write_latents(store, latents(5), "float32") == rows
    assert shard.read_bytes() == whole


# Finding


def test_scan_finds_every_latent(store: Path, rows: list[LatentRow]):
    more = write_latents(store, latents(2, (3, 2, 2), seed=1), "float32")
    assert scan_latents(store) == {row.latent_key: row for row in [*rows, *more]}


def test_scan_of_a_store_without_latents_is_empty(store: Path):
    assert scan_latents(store) == {}


def test_scan_passes_over_what_is_not_whole(store: Path, rows: list[LatentRow], tmp_path: Path):
    whole = write_latents(store, latents(2, seed=1), "float32")
    metadata, shard = fragment_files(store, rows[0].fragment)
    damages = [
        (flipped_bits, (metadata, 100)),
        (other_lengths, (metadata, 10)),
        (other_lengths, (shard, 10)),
        (not_plain_files, (metadata, tmp_path / "aside")),
        (not_plain_files, (shard, tmp_path / "aside")),
    ]
    for damage, arguments in damages:
        for each in damage(*arguments):
            assert set(scan_latents(store)) == {row.latent_key for row in whole}, (damage, each)


def test_scan_passes_over_strangers(store: Path, rows: list[LatentRow], tmp_path: Path):
    (store / "fragments/latents/notes.txt").write_text("mine")
    (store / "fragments/latents" / ("0" * 64)).symlink_to(tmp_path)
    assert len(scan_latents(store)) == 5


def test_scan_prefers_the_later_of_two_records_of_one_key(store: Path):
    (old,) = write_latents(store, [("key", np.ones((3, 4, 5), np.float32))], "float32")
    (new,) = write_latents(store, [("key", np.zeros((3, 4, 5), np.float32))], "float32")
    os.utime(shard_of(store, [old]), ns=(1, 1))
    assert scan_latents(store)["key"] == new
    os.utime(shard_of(store, [new]), ns=(0, 0))
    assert scan_latents(store)["key"] == old


def test_scan_and_reading_do_without_zarr_and_scan_two_hundred_fragments_quickly(store: Path, rows: list[LatentRow]):
    program = (
        "import sys; from pathlib import Path; from stages.stores.latents import *;"
        f"rows = scan_latents(Path({str(store)!r})); LatentReader([Path({str(store)!r})]).read(rows['key-0-0']);"
        "print(len(rows), 'zarr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "5 False\n"
    for seed in range(200):
        copy_fragment(store, rows[0], seed)
    started = time.process_time()
    assert len(scan_latents(store)) == 5
    assert time.process_time() - started < 0.5


def copy_fragment(store: Path, row: LatentRow, seed: int) -> None:
    """A fragment of the same size under a name that is not its own: read and parsed, then passed over."""
    target = store / f"fragments/latents/{seed:064x}"
    target.mkdir()
    for path in fragment_files(store, row.fragment):
        (target / path.name).write_bytes(path.read_bytes())


# Damage


def test_damage_names_the_fragment_the_record_and_the_remedy(store: Path, rows: list[LatentRow]):
    shard_of(store, rows).unlink()
    with pytest.raises(Damaged) as caught:
        LatentReader([store]).read(rows[2])
    line = caught.value.faults[0].line()
    assert line.startswith("error[latents.absent] c.0.0.0.0 is missing")
    assert f"({rows[2].fragment}, record key-0-2)" in line
    assert line.endswith("fix: flux2-lora encode-latents --config ... --force")


def test_every_flipped_bit_of_a_shard_is_refused(store: Path, rows: list[LatentRow]):
    missed = [at for at in flipped_bits(shard_of(store, rows), 600) if not refused(store, rows)]
    assert missed == []
    assert not refused(store, rows)


def test_every_flipped_bit_of_the_metadata_is_refused(store: Path, rows: list[LatentRow]):
    missed = [at for at in flipped_bits(metadata_of(store, rows), 600) if not refused(store, rows)]
    assert missed == []
    assert not refused(store, rows)


@pytest.mark.parametrize("part", [metadata_of, shard_of])
def test_every_other_length_is_refused(store: Path, rows: list[LatentRow], part):
    missed = [length for length in other_lengths(part(store, rows), 100) if not refused(store, rows)]
    assert missed == []


@pytest.mark.parametrize("part", [metadata_of, shard_of])
def test_zeroed_pages_are_refused(store: Path, rows: list[LatentRow], part):
    missed = [start for start in zeroed_pages(part(store, rows)) if not refused(store, rows)]
    assert missed == []


@pytest.mark.parametrize("part", [metadata_of, shard_of])
def test_absent_files_links_folders_and_pipes_are_refused(store: Path, rows: list[LatentRow], tmp_path: Path, part):
    for what in not_plain_files(part(store, rows), tmp_path / "aside"):
        with pytest.raises(Damaged):
            LatentReader([store]).read(rows[0])
        assert refused(store, rows), what
    assert not refused(store, rows)


def test_swapped_shards_are_refused(store: Path, rows: list[LatentRow]):
    others = write_latents(store, latents(5, seed=1), "float32")
    first, second = shard_of(store, rows), shard_of(store, others)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    for row in [*rows, *others]:
        with pytest.raises(Damaged) as caught:
            LatentReader([store]).read(row)
        assert caught.value.faults[0].code == "latents.digest"


def test_swapped_records_are_refused(store: Path, rows: list[LatentRow]):
    """A shard with two records exchanged, whose checksums all hold."""
    import zarr

    swapped = np.stack([latent for _, latent in latents(5)])[[1, 0, 2, 3, 4]]
    zarr.open_array(store / rows[0].fragment, mode="r+")[...] = swapped
    reader = LatentReader([store])
    for row in rows[:2]:
        with pytest.raises(Damaged, match=r"latents\.digest"):
            reader.read(row)
    assert np.array_equal(reader.read(rows[2]), latents(5)[2][1])


EDITS = {
    "shape": lambda document: document["shape"].__setitem__(0, 6),
    "rows without end": lambda document: document["shape"].__setitem__(0, 10**11),
    "negative": lambda document: document["shape"].__setitem__(0, -5),
    "dtype": lambda document: document.__setitem__("data_type", "int32"),
    "fill": lambda document: document.__setitem__("fill_value", 1),
    "codecs": lambda document: document["codecs"][0]["configuration"]["codecs"].pop(),
    "grid": lambda document: document["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 1),
    "separator": lambda document: document["chunk_key_encoding"]["configuration"].__setitem__("separator", "/"),
    "meaning": lambda document: document["attributes"].__setitem__("dtype", "bfloat16"),
    "order": lambda document: document["attributes"]["records"].reverse(),
    "fewer": lambda document: document["attributes"]["records"].pop(),
    "key": lambda document: document["attributes"]["records"][0].__setitem__("key", "key-0-1"),
    "more": lambda document: document["attributes"].__setitem__("note", "hello"),
    "unknown": lambda document: document.__setitem__("must_understand", 0),
    "nothing": lambda document: document.clear(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_edited_metadata_is_refused(store: Path, rows: list[LatentRow], edit):
    path = metadata_of(store, rows)
    document = json.loads(path.read_bytes())
    edit(document)
    path.write_text(json.dumps(document, separators=(",", ":"), sort_keys=True))
    for row in rows:
        with pytest.raises(Damaged):
            LatentReader([store]).read(row)
    assert scan_latents(store) == {}


def test_metadata_nested_without_end_is_refused(store: Path, rows: list[LatentRow]):
    metadata_of(store, rows).write_text("[" * 100_000)
    with pytest.raises(Damaged):
        LatentReader([store]).read(rows[0])


@pytest.mark.parametrize(
    "change",
    [
        {"row": 1},
        {"row": 5},
        {"row": -1},
        {"latent_key": "key-0-1"},
        {"channels": 4},
        {"height": 5, "width": 4},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"sha256": "0" * 64},
        {"fragment": f"fragments/latents/{0:064x}"},
    ],
)
def test_a_row_that_says_otherwise_is_refused(store: Path, rows: list[LatentRow], change):
    with pytest.raises(Damaged):
        LatentReader([store]).read(replace(rows[0], **change))


@pytest.mark.parametrize(
    "fragment",
    [
        "",
        ".",
        "/etc",
        "../outside",
        "fragments/latents/..",
        "fragments/latents/../latents/NAME",
        "./FRAGMENT",
        "FRAGMENT/",
    ],
)
def test_a_path_that_leaves_the_fragments_is_refused(store: Path, rows: list[LatentRow], fragment: str):
    path = fragment.replace("FRAGMENT", rows[0].fragment).replace("NAME", Path(rows[0].fragment).name)
    with pytest.raises(Damaged) as caught:
        LatentReader([store]).read(replace(rows[0], fragment=path))
    assert caught.value.faults[0].code == "latents.bad_path"


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_linked_folder_inside_the_store_is_refused(store: Path, rows: list[LatentRow], tmp_path: Path, level: int):
    folder = store / Path(*Path(rows[0].fragment).parts[: level + 1])
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match=rf"latents\.symlink.*fix: replace the link {folder} by "):
        LatentReader([store]).read(rows[0])


def test_a_linked_store_is_the_owners_choice(store: Path, rows: list[LatentRow], tmp_path: Path):
    (tmp_path / "link").symlink_to(store)
    assert np.array_equal(LatentReader([tmp_path / "link"]).read(rows[3]), latents(5)[3][1])


def test_the_second_store_is_asked_for_what_the_first_lacks(store: Path, rows: list[LatentRow], tmp_path: Path):
    (own,) = write_latents(tmp_path / "own", latents(1, seed=1), "float32")
    reader = LatentReader([tmp_path / "own", store])
    assert np.array_equal(reader.read(own), latents(1, seed=1)[0][1])
    assert np.array_equal(reader.read(rows[4]), latents(5)[4][1])


def test_damage_after_a_first_good_read_is_still_refused(store: Path, rows: list[LatentRow]):
    reader = LatentReader([store])
    reader.read(rows[0])
    shard = shard_of(store, rows)
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Damaged):
        reader.read(rows[0])
    shard.unlink()
    with pytest.raises(Damaged):
        reader.read(rows[0])
