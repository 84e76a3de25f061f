"""Headers that lie, and files that are something else: refused before anything is believed, soon and in little room.

What a header can say consistently (another type of the same width, a transposed shape) only a digest can tell.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Count, Measured
from tests.stages.project import Project, new_project
from tests.stores.test_tensors import LIES, small

MOST_SECONDS = 1.0
MOST_MEGABYTES = 256
# Each form that the study of readers lists; the others of LIES are variants.
FORMS = (
    "empty file", "seven bytes", "header over the cap", "largest header length", "header over the file", "not json",
    "negative offset", "overflowing offset", "backward offsets", "overflowing shape", "overlap", "hole",
    "trailing bytes", "missing bytes", "duplicate tensor", "duplicate metadata", "wider type", "unknown type",
    "metadata number", "deep nesting",
)  # fmt: skip
SCRIPT = """
import json, resource, sys, time
from pathlib import Path
from schemas.errors import Damaged
from stages.stores import tensors
found = {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for line in sys.stdin:
    path, sha256 = json.loads(line)
    started = time.perf_counter()
    try:
        tensors.load(Path(path), sha256=sha256)
        code = ""
    except Damaged as error:
        code = error.faults[0].code
    found[Path(path).stem] = [code, time.perf_counter() - started]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([found, grown / 1024]))
"""


def lying_files(folder: Path) -> dict[Path, str | None]:
    """Write a file for each form; return them with the sha256 that is expected of them, None where nobody knows."""
    from stages.stores import tensors

    files: dict[Path, str | None] = {}
    for name in LIES:
        path = folder / f"{name}.safetensors"
        path.write_bytes(LIES[name][0])
        files[path] = None
    digest = tensors.save(folder / "good.safetensors", small(), {})
    good = (folder / "good.safetensors").read_bytes()
    for name, old, new in (("same-width type", b'"F32"', b'"I32"'), ("transposed shape", b"[3,5]", b"[5,3]")):
        path = folder / f"{name}.safetensors"
        path.write_bytes(good.replace(old, new))
        files[path] = digest
    (folder / "good.safetensors").unlink()
    return files


@pytest.mark.bar("Q17")
def test_every_lie_is_refused_quickly_and_in_little_room(tmp_path: Path, measured: Measured) -> None:
    files = lying_files(tmp_path)
    asked = "".join(f"{json.dumps([str(path), sha256])}\n" for path, sha256 in files.items())
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=asked, capture_output=True, text=True, check=True)
    found, grown = json.loads(done.stdout)
    listed = [*FORMS, "same-width type", "transposed shape"]
    refused = [name for name in listed if found[name][0]]
    slowest = max(seconds for _, seconds in found.values())
    measured(
        "Q17", f"{len(refused)} of {len(listed)} forms, slowest {slowest:.3f} s, all together {grown:.0f} MB more"
    )
    measured("Q17", f"{sum(bool(code) for code, _ in found.values())} of {len(files)} variants")
    assert len(listed) == 22
    assert [name for name, (code, _) in found.items() if not code] == []
    assert slowest < MOST_SECONDS
    assert grown < MOST_MEGABYTES


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = new_project(tmp_path_factory.mktemp("lies") / "project")
    project.make("validate", "encode-latents", "encode-text")
    return project


@pytest.mark.bar("Q17")
def test_command_that_is_given_one_ends_with_4_and_names_it(encoded: Project, tmp_path: Path, count: Count) -> None:
    files = lying_files(tmp_path)
    for path in list(files)[: count(6, len(files))]:
        if files[path] is not None:
            continue
        ran = encoded.run("train", "--set", f'train.init_lora="{path}"')
        assert ran.code == 4, ran.stderr
        assert path.name in ran.stderr
        assert "fix: " in ran.stderr


@pytest.mark.bar("Q17")
@pytest.mark.parametrize("name", ["lora.pt", "lora.bin", "lora.ckpt", "lora.npy", "lora.zip", "lora.safetensors"])
def test_pickle_is_refused_by_name_and_by_content_and_never_runs(encoded: Project, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    # protocol 0: os.system("touch canary")
    (tmp_path / name).write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
    ran = encoded.run("train", "--set", f'train.init_lora="{tmp_path / name}"')
    assert ran.code == 4, ran.stderr
    assert name in ran.stderr
    assert not canary.exists()
