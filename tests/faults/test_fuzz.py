"""Mutated files of every kind that comes from outside: accepted or refused in one line, never a crash or a hang.

Mutations are seeded: a failure names the round, and comes again.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from schemas.errors import BadConfig, Damaged, Fault, NoResources, RejectedInput, StageError
from schemas.tables import CAPTIONS
from stages.contract.config import load_config
from stages.dataset.decoder import Decoders
from stages.dataset.metadata import read_rows
from stages.stores import tensors
from stages.stores.tables import read_table, write_table
from tests.dataset.corpus import encoded, jpeg, png, scene, turned, webp
from tests.dataset.test_decoder import kinds
from tests.faults.conftest import Count, Measured
from tests.stages.project import SETTINGS, new_project
from tests.stores.test_tensors import small

MOST_SECONDS = 10.0
PIPELINES = Path(__file__).parents[2] / "pipelines"


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Change, remove, repeat or insert some bytes, mostly near the beginning, where the structure is."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 40))):
        if not changed:
            break
        place = draw.randrange(min(len(changed), draw.choice((16, 64, 400, 1 << 20))))
        match draw.randrange(6):
            case 0:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                changed[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[place : place + draw.choice((1, 4, 100))]
            case 3:
                changed[place:place] = draw.randbytes(draw.choice((1, 4, 100)))
            case 4:
                changed[place:place] = changed[place : place + draw.choice((1, 16, 300))]
            case _:
                del changed[draw.randrange(len(changed)) :]
    return bytes(changed)


class Log:
    """What came of each round, and how long the slowest took."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def round(self, expected: tuple[type[StageError], ...], action: Callable[[], object]) -> None:
        """Do something that ends well, or in an error of ours with a code, a remedy and one printable line."""
        started = time.monotonic()
        try:
            action()
            self.outcomes["accepted"] += 1
        except expected as error:
            for fault in error.faults:
                well_said(fault)
            self.outcomes["refused"] += 1
        self.slowest = max(self.slowest, time.monotonic() - started)

    def check(self, rounds: int) -> str:
        assert sum(self.outcomes.values()) == rounds
        assert self.outcomes["refused"] > rounds // 8
        assert self.slowest < MOST_SECONDS
        return f"{dict(self.outcomes)}, slowest {self.slowest:.2f} s"


def well_said(fault: Fault) -> None:
    assert fault.code
    assert fault.fix
    assert fault.where
    assert fault.line().isprintable()


def cycled(seeds: Sequence[bytes], rounds: int) -> Iterator[tuple[int, bytes]]:
    draw = random.Random(23)
    return ((number, mutated(seeds[number % len(seeds)], draw)) for number in range(rounds))


@pytest.mark.bar("Q19")
def test_mutated_pictures_end_no_process_and_keep_none_waiting(
    tmp_path: Path, count: Count, measured: Measured
) -> None:
    seeds = [png(), jpeg(), webp(), turned(6), encoded(scene(), "JPEG", progressive=True), *kinds().values()]
    rounds, log, crashes = count(60, 1000), Log(), Counter[str]()
    made = Decoders(64.0)

    def look(name: str) -> None:
        (seen,) = made.inspect(tmp_path, [name])
        if isinstance(seen, Fault):
            crashes[seen.code] += 1
            raise RejectedInput.of([seen])
        data = (tmp_path / name).read_bytes()
        made.pixels(data, (0, 0, min(seen.width, 32), min(seen.height, 32)), (16, 16), "#ffffff", where=name)

    for number, data in cycled(seeds, rounds):
        name = f"{number}.png"
        (tmp_path / name).write_bytes(data)
        log.round((RejectedInput,), lambda name=name: look(name))
    made.close()
    ended = crashes["picture.crash"] + crashes["picture.too_slow"]
    measured("Q19", f"pictures: {log.check(rounds)}, children ended {ended}")


@pytest.mark.bar("Q19")
def test_mutated_safetensors_are_read_or_refused(tmp_path: Path, count: Count, measured: Measured) -> None:
    path, lora = tmp_path / "a.safetensors", Path(__file__).parents[1] / "golden" / "lora-bfl.safetensors"
    tensors.save(path, small(), {"format": "pt"})
    rounds, log = count(60, 1000), Log()
    for _, data in cycled([path.read_bytes(), lora.read_bytes()[:4096]], rounds):
        path.write_bytes(data)
        log.round((Damaged, NoResources), lambda: tensors.load(path))
    measured("Q19", f"safetensors: {log.check(rounds)}")


def foreign(checksums: bool) -> bytes:  # noqa: FBT001
    import pyarrow as pa
    from pyarrow import parquet

    names = [f"{number}.png" for number in range(30)]
    table = pa.table({"file_name": names, "text": [f"caption of {name}" for name in names]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, write_page_checksum=checksums)
    return buffer.getvalue()


@pytest.mark.bar("Q19")
def test_mutated_parquet_is_read_or_refused(tmp_path: Path, count: Count, measured: Measured) -> None:
    """A quarter are caption tables of other people, without seals, read in a child each; the others are our own."""
    own, theirs = tmp_path / "captions.parquet", tmp_path / "metadata.parquet"
    write_table(own, CAPTIONS, [{"caption_id": f"{number:032x}", "text": "a cat"} for number in range(30)])
    rounds, log = count(60, 1000), Log()

    def read_foreign() -> None:
        if faults := [each for each in read_rows(theirs, theirs.name) if isinstance(each, Fault)]:
            raise RejectedInput.of(faults)

    draw = random.Random(5)
    seeds = [foreign(checksums=True), *[own.read_bytes()] * 3, foreign(checksums=False), *[own.read_bytes()] * 3]
    for number, data in cycled([seeds[n % 8][::-1] if n % 3 else seeds[n % 8] for n in range(24)], rounds):
        # Mutated from the end as well: there lies the footer.
        data = data[::-1] if number % 24 % 3 else data
        if number % 4:
            own.write_bytes(data)
            log.round((Damaged,), lambda: read_table(own, CAPTIONS))
        else:
            theirs.write_bytes(data if draw.random() < 0.9 else data + b"PAR1")
            log.round((RejectedInput,), read_foreign)
    measured("Q19", f"Parquet: {log.check(rounds)}")


@pytest.mark.bar("Q19")
def test_mutated_configurations_are_read_or_refused(tmp_path: Path, count: Count, measured: Measured) -> None:
    path = tmp_path / "a.toml"
    seeds = [SETTINGS.encode(), *(each.read_bytes() for each in sorted(PIPELINES.glob("*.toml")))]
    rounds, log = count(60, 1000), Log()
    for _, data in cycled(seeds, rounds):
        path.write_bytes(data)
        log.round((BadConfig,), lambda: load_config(path))
    measured("Q19", f"configurations: {log.check(rounds)}")


@pytest.mark.bar("Q19")
@pytest.mark.bar("Q20")
def test_mutated_datasets_go_through_validate_or_end_with_3(tmp_path: Path, count: Count, measured: Measured) -> None:
    """Captions, tables and JSON sidecars in folders, through the whole command."""
    draw, ended, lines = random.Random(3), Counter[int](), 0
    seeds = {
        "ada.txt": b"a [trigger] called ada\r\nand more",
        "metadata.jsonl": b'{"file_name": "eve.png", "text": "one"}\n{"file_name": "fay.png", "text": ["a", "b"]}\n',
        "metadata.csv": b'file_name,text\ngil.png,"one, two"\n',
        "bob.json": json.dumps({"caption": "a cat", "tags": [1, 2, {"a": None}]}).encode(),
    }
    for number in range(count(12, 200)):
        project = new_project(tmp_path / str(number))
        (project.pictures / "bob.txt").unlink()
        for name, data in seeds.items():
            (project.pictures / name).write_bytes(mutated(data, draw) if draw.random() < 0.2 else data)
        for name in ("eve", "fay", "gil"):
            (project.pictures / f"{name}.png").write_bytes(png())
        ran = project.run("validate")
        ended[ran.code] += 1
        said = [line for line in ran.stderr.splitlines() if line]
        lines += len(said)
        assert ran.code in (0, 3), ran.stderr
        assert all(line.isprintable() for line in said)
        assert all("fix: " in line for line in said if line.startswith("error["))
    measured("Q19", f"datasets: exits {dict(sorted(ended.items()))}")
    measured("Q20", f"datasets: {lines} lines, all printable, every error with a fix")
