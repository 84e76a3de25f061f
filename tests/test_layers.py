"""The house rules that no linter knows: who may import whom, what is heavy, how long things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("schemas", "stages")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "pipelines").rglob("*.py"))]
# A module imports from its own room and from those of a higher rank; rooms of one rank are strangers.
ROOMS = {
    "cli": 0,
    "verb": 1,
    "outlook": 1.25,
    "inspection": 1.5,
    "pretraining": 1.5,
    "pages": 1.5,
    "training": 2,
    "lora": 3,
    "flux2": 4,
    "world": 4,
    "dataset": 4,
    "console": 4,
    "stores": 5,
    "hub": 5,
    "contract": 6,
    "schemas": 7,
}
VERB_RANK = ROOMS["verb"]
MLX = re.compile(r"stages/(flux2|lora|pretraining|training|world)/.*|stages/stores/tensors\.py")
# Inside the functions of verbs that compute, too.
MLX_IN_FUNCTIONS = re.compile(r"stages/[a-z_]+\.py")
TABLES = re.compile(r"stages/stores/.*|schemas/tables\.py")
PICTURES = re.compile(r"stages/dataset/.*|stages/console/charts\.py|stages/training/previews\.py|stages/pages/.*")
LIBRARIES = {"mlx": MLX, "zarr": TABLES, "pyarrow": TABLES, "PIL": PICTURES}
LAZY = {"zarr", "pyarrow", "matplotlib", "rich", "tokenizers", "jinja2"}
# Reference implementations and their like: for recording golden values, never at run time.
NEVER = {"torch", "diffusers", "transformers", "peft", "tensorflow", "jax", "pandas", "scipy"}
HEAVY = ["numpy", "mlx", "pyarrow", "zarr", "PIL", "rich", "matplotlib", "tokenizers", "jinja2"]
MOST_LINES = 400
MOST_FUNCTION_LINES = 50
MOST_PARAMETERS = 6
# A path of the machine that something was written on.
FOREIGN_PATH = re.compile(rb"(?<![\w.:/<-])/(?:work|home|root|Users|mnt|tmp)/\w")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_verb(module: str) -> bool:
    """Files of `stages` are verbs, folders are rooms."""
    package, _, word = module.partition(".")
    return package == "stages" and (ROOT / "stages" / f"{word}.py").is_file() and word not in ("cli", "__main__")


def room(module: str) -> str:
    """Return the room of a module of ours; each verb is one of its own."""
    if module.split(".")[0] == "schemas":
        return "schemas"
    if module in ("stages.cli", "stages.__main__"):
        return "cli"
    return module if is_verb(module) else module.split(".")[1]


def rank(where: str) -> float:
    return ROOMS.get(where, VERB_RANK)


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that an import statement names; `from stages import x` names `stages.x`."""
    match node:
        case ast.Import(names=names):
            yield from (each.name for each in names)
        case ast.ImportFrom(module=str(module), names=names):
            yield from (f"{module}.{each.name}" for each in names) if module == "stages" else [module]


def module_level(path: Path) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported."""

    def run(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
                continue
            yield statement
            if isinstance(statement, ast.If | ast.Try | ast.With | ast.ClassDef):
                yield from run(statement.body)

    yield from run(tree(path).body)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_imports_point_to_the_right() -> None:
    wrong = []
    for path in SOURCES:
        if path.parent == ROOT / "stages" and path.name == "__init__.py":
            continue
        here = room(name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        for node in ast.walk(tree(path)):
            for module in imported(node):
                if module.split(".")[0] not in PACKAGES or room(module) == here:
                    continue
                if rank(room(module)) <= rank(here):
                    wrong.append(f"{name(path)}:{node.lineno} imports {module}")
    assert wrong == []


def test_every_room_is_known() -> None:
    rooms = {path.name for path in (ROOT / "stages").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(ROOMS)


def test_libraries_are_imported_only_in_their_rooms() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            for module in imported(node):
                library = module.split(".")[0]
                allowed = LIBRARIES.get(library)
                in_verb = library == "mlx" and MLX_IN_FUNCTIONS.fullmatch(name(path))
                if library in NEVER or (allowed and not allowed.fullmatch(name(path)) and not in_verb):
                    wrong.append(f"{name(path)}:{node.lineno} imports {module}")
    assert wrong == []


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = []
    for path in SOURCES:
        for statement in module_level(path):
            for module in imported(statement):
                library = module.split(".")[0]
                if library in LAZY or (library == "mlx" and not MLX.fullmatch(name(path))):
                    wrong.append(f"{name(path)}:{statement.lineno} imports {module}")
    assert wrong == []


def verbs() -> list[str]:
    return sorted(f"stages.{path.stem}" for path in (ROOT / "stages").glob("[a-z]*.py") if path.stem != "cli")


# What an up-to-date stage looks at beside its own verb.
ON_THE_WAY = ["stages.flux2.identity", "stages.training.checkpoints", "stages.dataset.discover"]


@pytest.mark.parametrize("module", ["stages.cli", *verbs(), *ON_THE_WAY])
def test_importing_a_command_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print([each for each in {HEAVY} if each in sys.modules])"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"


def test_importing_a_module_does_nothing() -> None:
    """Only definitions stand at module level: no call whose result is thrown away, no loop."""
    allowed = (
        ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
    )  # fmt: skip
    wrong = []
    for path in SOURCES:
        if path.name == "__main__.py":
            continue
        for statement in tree(path).body:
            docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            guarded = isinstance(statement, ast.If) and ast.unparse(statement.test) in (
                "TYPE_CHECKING",
                "__name__ == '__main__'",
            )
            if not (isinstance(statement, allowed) or docstring or guarded):
                wrong.append(f"{name(path)}:{statement.lineno} {ast.unparse(statement).splitlines()[0]}")
    assert wrong == []


def test_no_file_is_too_long() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{name(path)}:{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in ALL
        for function in functions(path)
    }
    assert {function: lines for function, lines in lengths.items() if lines > MOST_FUNCTION_LINES} == {}


def test_no_function_takes_too_many_parameters() -> None:
    wrong = []
    for path in SOURCES:
        for function in functions(path):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            if len([each for each in given if each.arg not in ("self", "cls")]) > MOST_PARAMETERS:
                wrong.append(f"{name(path)}:{function.lineno} {function.name}")
    assert wrong == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [name(path) for path in SOURCES if path.name != "__init__.py" and not ast.get_docstring(tree(path))]
    assert silent == []


def test_init_files_are_empty() -> None:
    assert [name(path) for path in ALL if path.name == "__init__.py" and path.read_bytes() != b""] == []


def test_every_package_is_installed_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = sorted({name(path.parent).replace("/", ".") for path in SOURCES})
    assert sorted(project["tool"]["setuptools"]["packages"]) == found
    assert [package for package in found if not (ROOT / package.replace(".", "/") / "__init__.py").is_file()] == []


def test_tests_lie_in_the_folder_of_their_room() -> None:
    own_rooms = [ROOT / "tests" / room for room in ("faults", "faults/staleness", "learning")]
    strays = [
        name(path)
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.parent not in (ROOT / "tests", *own_rooms)
        and not any((ROOT / base / path.parent.relative_to(ROOT / "tests")).is_dir() for base in ("stages", "."))
    ]
    assert strays == []
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [name(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_files_are_named_for_what_they_hold() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base_utils", "v2"}
    assert [name(path) for path in SOURCES if vague & {path.stem, *path.stem.split("_")}] == []


def test_no_path_of_another_machine_is_written_anywhere() -> None:
    texts = [*ALL, ROOT / "Makefile", ROOT / "README.md", ROOT / "pyproject.toml"]
    texts += [*(ROOT / "pipelines").glob("*.*"), *(ROOT / ".ci").glob("*")]
    wrong = [
        f"{name(path)}: {found.group().decode()}"
        for path in texts
        if path.is_file()
        for found in FOREIGN_PATH.finditer(path.read_bytes())
    ]
    assert wrong == []
