"""One way to publish: whatever can change a disk, or believes what lies on one, is named here with its reason.

A call that makes, changes, moves or removes something stands in the contract (`publish`, `locks`), writes into a work
folder that is published from there, or is a file that nobody takes for whole.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layers import SOURCES, name, tree

CHANGING = {
    "write_bytes", "write_text", "touch", "mkdir", "makedirs", "rename", "unlink", "remove", "rmdir", "rmtree",
    "move", "symlink_to", "hardlink_to", "symlink", "link", "truncate", "ftruncate", "copyfile", "copy2", "copytree",
    "savez", "save_safetensors", "savetxt", "tofile", "mkdtemp", "mkstemp", "NamedTemporaryFile",
    "TemporaryDirectory",
    "extractall", "extract", "chmod", "utime", "ZipFile", "connect",
}  # fmt: skip
# Reading of records: through the stores, which check what they read.
BELIEVING = {"mx.load", "np.load", "np.fromfile", "np.memmap", "zarr.open", "zarr.open_array", "zarr.open_group"}
BELIEVING |= {"parquet.read_table", "parquet.ParquetFile", "parquet.read_metadata", "safe_open", "load_file"}
WRITING_MODES = set("wax+")
WORK = "into a work folder, published whole"
STREAMS = "stages/console/streams.py"
ALLOWED = {
    "stages/contract/publish.py": "the one way",
    "stages/contract/locks.py": "lock files, which say only who holds them",
    "stages/contract/digests.py": "what is remembered of stats: proved by seals, rebuilt when damaged",
    "stages/contract/artifacts.py": WORK,
    "stages/contract/runner.py": WORK,
    "stages/contract/trust.py": WORK,
    "stages/contract/bundles.py": WORK,
    "stages/contract/signatures.py": "what ssh-keygen is to read, removed at once",
    "stages/stores/tensors.py": "new files only, synced, below a work folder",
    "stages/stores/tables.py": WORK,
    "stages/stores/seals.py": WORK,
    "stages/stores/embeddings.py": WORK,
    "stages/stores/latents.py": WORK,
    "stages/flux2/micro.py": WORK,
    "stages/pretraining/parts.py": WORK,
    "stages/inspection/compaction.py": WORK,
    "stages/training/checkpoints.py": WORK,
    "stages/training/rotation.py": "checkpoints go in one rename, once a newer one is durable",
    "stages/training/control.py": "requests and answers, gone once they are heard",
    "stages/training/recorder.py": "the live log, written anew from checkpoints",
    "stages/hub/transfer.py": "the hub's cache, in the hub's own layout: blobs are named by their content",
    "stages/validate.py": WORK,
    "stages/train.py": WORK,
    "stages/preview.py": WORK,
    "stages/outlook/prospect.py": "a folder aside, gone at the end: nothing of the run's is touched",
    "stages/why.py": "a folder aside, gone at the end: nothing of the run's is touched",
    "stages/outlook/chain.py": "a folder aside, gone at the end: nothing of the run's is touched",
    "stages/outlook/reasons.py": "a folder aside, gone at the end: nothing of the run's is touched",
    "stages/run.py": "a file aside, gone at the end: the pipeline that --plan looks at",
    "stages/inspection/reachability.py": "things go in one rename each",
    STREAMS: "the standard streams, and the null device in place of one that is closed",
}

# Where JSON is decoded that nobody else can have written.
PROVED = {
    "stages/dataset/decoder.py": "whoever asks for the answer is ready for it",
    "stages/dataset/decoding.py": "what the parent process asks",
    "stages/dataset/inspections.py": "what was remembered, proved by its seal",
    "stages/preview.py": "a file of an artifact, its bytes just compared",
    "stages/pretraining/work.py": "its own report, beside what it made",
    "stages/run.py": "what our own process printed",
    "stages/training/checkpoints.py": "metrics, proved by their digest",
}


def changes(node: ast.Call) -> str | None:
    """Return the name of a call that changes a disk or believes one, None for any other."""
    called = ast.unparse(node.func)
    last = called.rpartition(".")[2]
    if last in CHANGING or called in BELIEVING:
        return last
    if last == "replace" and len(node.args) == 1 and not node.keywords:
        return last
    if last in ("open", "fdopen") and any(WRITING_MODES & set(mode) for mode in modes(node)):
        return "open to write"
    return None


def modes(node: ast.Call) -> Iterator[str]:
    """Yield what may be the mode that a file is opened in: short texts of the letters of modes."""
    for each in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]:
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and set(each.value) <= set("rwaxbt+"):
            yield each.value
        elif isinstance(each, ast.BinOp | ast.Attribute):
            yield "w" if "O_WRONLY" in ast.unparse(each) or "O_RDWR" in ast.unparse(each) else ""


def found() -> dict[str, set[str]]:
    """Return module -> names of such calls in it."""
    calls: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and (called := changes(node)):
                calls.setdefault(name(path), set()).add(called)
    return calls


def test_everything_that_changes_a_disk_is_named_here() -> None:
    unnamed = {module: sorted(calls) for module, calls in found().items() if module not in ALLOWED}
    assert unnamed == {}, "publish by stages/contract/publish.py, or say here why not"


def test_nothing_is_named_here_without_need() -> None:
    present, writing = {name(path) for path in SOURCES}, found()
    assert [module for module in ALLOWED if module in present and module not in writing] == []


def test_rooms_that_compute_or_show_change_no_disk() -> None:
    quiet = ("stages/lora/", "stages/dataset/", "stages/console/", "schemas/")
    assert [module for module in found() if module.startswith(quiet) and module != STREAMS] == []


def catching(module: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Yield every call that decodes JSON, with what the handlers around it catch."""
    for node in ast.walk(module):
        handled = (
            " ".join(ast.unparse(each.type) for each in node.handlers if each.type)
            if isinstance(node, ast.Try)
            else ""
        )
        for call in (each for part in node.body for each in ast.walk(part)) if isinstance(node, ast.Try) else [node]:
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("msgspec.json.decode", "json.loads"):
                yield call, handled


def careless() -> dict[str, set[int]]:
    """Return module -> lines on which JSON is decoded that nobody else can have written, or without a thought."""
    lines: dict[str, set[int]] = {}
    for path in SOURCES:
        caught = list(catching(tree(path)))
        safe = {call.lineno for call, handled in caught if "UNREADABLE" in handled or "Exception" in handled}
        safe |= {call.lineno for call, handled in caught if "ValueError" in handled and "RecursionError" in handled}
        if left := {call.lineno for call, _ in caught} - safe:
            lines[name(path)] = left
    return lines


def test_who_decodes_json_is_ready_for_all_that_it_raises() -> None:
    assert {module: lines for module, lines in careless().items() if module not in PROVED} == {}
    assert [module for module in PROVED if module not in careless()] == []


@pytest.mark.parametrize(
    "line",
    [
        'path.write_bytes(b"")',
        'path.open("wb")',
        'open(path, mode="r+b")',
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "aside.replace(target)",
        "shutil.copyfile(a, b)",
        'mx.load("x")',
        "zarr.open_array(folder)",
    ],
)
def test_writer_is_recognised(line: str) -> None:
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    assert changes(call)


@pytest.mark.parametrize(
    "line", ['path.open("rb")', 'text.replace("a", "b")', "os.open(path, os.O_RDONLY)", "open(path)"]
)
def test_reader_is_left_alone(line: str) -> None:
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    assert changes(call) is None
