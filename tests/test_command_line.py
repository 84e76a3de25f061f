"""The command line as people and programs meet it: options, help, errors, exit codes, one object on stdout."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import pytest

from schemas import errors
from schemas.errors import StageError
from schemas.manifest import Result
from stages import cli
from stages.console.invocation import SHARED, option

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "pipelines" / "demo.toml"
STAGE = "--config -c --set --store --also --trust --runs --force --explain --wait --paranoid --json --quiet --debug"
# New knobs go into the configuration; a new option has to be written here.
OPTIONS = {
    **dict.fromkeys(("validate", "encode-latents", "encode-text", "preview"), STAGE),
    "train": f"{STAGE} --resume-only --profile",
    "verify": f"{STAGE} --quick --deep --subset --recompute --model file",
    "run": "pictures --model --trigger --output -o --max-steps --save-every-n-steps --resolution --rank "
    "--learning-rate --batch-size --seed --validation-prompt --validation-seed --validation-size "
    "--store --runs --plan --json --quiet -q --debug",
    "fetch": "model --revision --json --quiet --debug",
    "timesteps": "--config -c --set --draws --output -o --json --debug",
    "gc": "--store --runs --older-than --delete --compact --pin --wait --json --quiet --debug",
    "repair": "--config -c --set --store --also --trust --runs findings --json --quiet --debug",
    "control": "run action --runs --json --debug",
    "plan": "--config -c --set --store --also --trust --runs --bench --json --quiet --debug",
    "why": "--config -c --set --store --also --trust --runs stage --json --debug",
    "find-lr": "--config -c --set --store --also --trust --runs --lowest --highest --steps --output -o "
    "--json --quiet --debug",
    "ema": "--config -c --set --store --also --trust --runs --sigma-rel --output -o --json --quiet --debug",
    "report": "run --output -o --config -c --store --also --runs --open --json --debug",
    "compare": "names --output -o --store --also --runs --open --json --debug",
    "quantize": "--config -c --set --store --also --trust --runs --force --json --quiet --debug",
    "pretrain": "part --recipe --set --output -o --debug",
    "bundle": "--config -c --set --store --also --trust --runs --output -o --key --json --quiet --debug",
    "unbundle": "bundle --output -o --trust --unsigned --json --quiet --debug",
    "sign": "store --key --json --quiet --debug",
    "bench": "model --size --batch-size --rank --quantize --steps --checkpointing --compile --json --debug",
}
FAILURE = {"stage", "status", "key", "path", "digest", "counts", "seconds", "error"}
LINE = re.compile(r"error\[[a-z_.]+\] .+\. fix: .+")
BUG = """
import sys
from stages import cli
from stages.validate import Validate
def broken(self, job):
    raise LookupError("nobody foresaw this")
Validate.plan = broken
sys.argv = ["flux2-lora", *sys.argv[1:]]
cli.main()
"""

COMMANDS = cli.COMMAND.list_commands(click.Context(cli.COMMAND))


def command(name: str) -> click.Command:
    found = cli.COMMAND.get_command(click.Context(cli.COMMAND), name)
    assert found is not None
    return found


def process(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, stdout and stderr apart."""
    line = [sys.executable, "-m", "stages", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def answer(capfd: pytest.CaptureFixture[str], arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a command line in this process; return its exit code, stdout and stderr."""
    code = cli.run(arguments)
    out, err = capfd.readouterr()
    return code, out, err


def the_object(out: str) -> dict[str, object]:
    """Return the one object on stdout, valid by the schema."""
    assert out.count("\n") == 1
    msgspec.json.decode(out, type=Result)
    return json.loads(out)


def test_every_stage_and_helper_is_a_command() -> None:
    assert COMMANDS[:6] == ["validate", "encode-latents", "encode-text", "train", "preview", "verify"]
    assert set(COMMANDS) == set(OPTIONS)
    verbs = {path.stem.strip("_").replace("_", "-") for path in (ROOT / "stages").glob("*.py")} - {
        "init",
        "main",
        "cli",
    }
    assert verbs == set(COMMANDS)


def test_readme_lists_every_helper_in_the_order_of_the_program() -> None:
    table = (ROOT / "README.md").read_text().partition("| helper | what it does |")[2].partition("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert [word.split()[0] for cell in first for word in re.findall(r"`([^`]+)`", cell)] == list(cli.HELPERS)


# What one command means by an option that others have under that name.
OWN = {
    ("gc", "--runs"), ("gc", "--wait"), ("run", "--quiet"), ("report", "--config"), ("unbundle", "--trust"),
    ("pretrain", "--set"), ("verify", "--config"), ("verify", "--force"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_option_of_several_commands_is_the_same_in_each(name: str) -> None:
    for parameter in command(name).params:
        shared = parameter.opts[0].removeprefix("--")
        if parameter.opts[0].startswith("--") and shared in SHARED and (name, parameter.opts[0]) not in OWN:
            assert parameter.to_info_dict() == option(shared).to_info_dict()


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_allowed(name: str) -> None:
    found = {
        spelling for parameter in command(name).params for spelling in (*parameter.opts, *parameter.secondary_opts)
    }
    assert sorted(found) == sorted(OPTIONS[name].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capfd, [name, "--help"])
    assert (code, err) == (0, "")
    assert f"Example:\n    flux2-lora {name} " in out
    assert out == answer(capfd, [name, "-h"])[1]
    undescribed = [each.opts for each in command(name).params if isinstance(each, click.Option) and not each.help]
    assert undescribed == []


def test_help_of_verify_says_which_options_of_every_stage_do_nothing_there(capfd: pytest.CaptureFixture[str]) -> None:
    idle = re.compile(r"^  --(\w+) +Changes nothing here", re.M)
    assert idle.findall(answer(capfd, ["verify", "--help"])[1]) == ["force", "explain", "wait"]
    assert idle.findall(answer(capfd, ["train", "--help"])[1]) == []


@pytest.mark.parametrize("name", cli.STAGES)
def test_every_stage_says_what_it_reads_and_writes(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    out = answer(capfd, [name, "--help"])[1]
    assert "It reads " in out
    assert "writes " in out


def test_group_lists_every_command_with_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capfd, ["--help"])
    assert code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name}  +[A-Z].*", out, re.MULTILINE)
    assert answer(capfd, []) == (0, out, "")


def test_version_is_that_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert answer(capfd, ["--version"]) == (0, "flux2-lora 0.1.0\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["validate", "--help"], ["run", "--help"]])
def test_help_comes_within_three_tenths_of_a_second(arguments: list[str]) -> None:
    def seconds() -> float:
        """Processor time: what a busy machine does not change."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["train"], "Missing option '--config' / '-c'", "flux2-lora train --help"),
        (["train", "--config"], "requires an argument", "flux2-lora train --help"),
        (["train", "-c", "x.toml", "extra"], "unexpected extra argument (extra)", "flux2-lora train --help"),
        (["train", "-c", "x.toml", "--forc"], "No such option", "did you mean --force?"),
        (["train", "-c", "x.toml", "--resume-onyl"], "No such option", "did you mean --resume-only?"),
        (["verify", "-c", "x.toml", "--resume-only"], "No such option", "flux2-lora verify --help"),
        (["trian"], "no such command trian", "did you mean train?"),
        (["encode_latents"], "no such command encode_latents", "did you mean encode-latents?"),
        (["xyzzy"], "no such command xyzzy: valid: validate, encode-latents", "flux2-lora --help"),
        (["--verbose"], "No such option", "did you mean --version?"),
        (["bench", "gpt"], "'gpt' is not one of", "flux2-lora bench --help"),
    ],
)
def test_usage_error_is_one_line_with_a_remedy(
    capfd: pytest.CaptureFixture[str], arguments: list[str], what: str, fix: str
) -> None:
    code, out, err = answer(capfd, arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error[usage] ")
    assert what in err
    assert err.endswith(f". fix: {fix}\n")


@pytest.mark.parametrize("arguments", [["train", "--json"], ["trian", "--json"], ["train", "--json", "--forc"]])
def test_usage_error_is_one_object_for_programs(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, _ = answer(capfd, arguments)
    found = the_object(out)
    assert code == 2
    assert set(found) == FAILURE
    assert (found["stage"], found["status"]) == (arguments[0], "failed")
    assert set(found["error"]) == {"code", "what", "where", "fix"}
    assert found["error"]["code"] == "usage"


def test_every_fault_of_a_configuration_is_a_line_and_the_first_is_the_object(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[validate]\ndataset = '.'\n[train]\nlerning_rate = 1\nrank = 0\n")
    code, out, err = answer(capfd, ["encode-text", "--config", str(path), "--json", "--set", "preview.size=9"])
    assert code == 2
    assert len(err.splitlines()) == 3
    assert all(LINE.fullmatch(line) for line in err.splitlines())
    found = the_object(out)
    assert set(found) == FAILURE
    assert found["error"]["code"] == "config.unknown_key"
    assert str(path) in found["error"]["where"]
    assert found["error"]["fix"] == "did you mean train.learning_rate?"
    assert (found["key"], found["path"], found["digest"], found["counts"]) == (None, None, None, {})


@pytest.mark.parametrize("name", ["validate", "verify"])
def test_stages_with_findings_list_all_faults_in_the_object(capfd: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = answer(capfd, [name, "-c", str(DEMO), "--set", "a=1", "--set", "b=2", "--json"])
    assert code == 2
    assert [fault["what"] for fault in the_object(out)["findings"]] == ["unknown setting a", "unknown setting b"]


@pytest.mark.parametrize("name", cli.STAGES)
def test_absent_configuration_ends_with_2(capfd: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = answer(capfd, [name, "--config", "none.toml"])
    assert (code, out) == (2, "")
    assert err == "error[config.absent] no such configuration file (none.toml). fix: name a .toml file\n"


@pytest.mark.parametrize("name", ["encode-latents", "encode-text", "train", "preview"])
def test_stage_before_its_input_ends_with_5_and_names_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    code, out, err = answer(capfd, [name, "--config", str(DEMO), *places])
    assert (code, out) == (5, "")
    fix = rf"flux2-lora \S+ --config {DEMO} {' '.join(places)}"
    assert re.search(rf"error\[input\.missing\] \S+ has not run \(demo\)\. fix: {fix}\n", err)


def test_success_is_one_object_on_stdout_and_lines_for_people_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [
        "validate",
        "-c",
        str(DEMO),
        "--store",
        str(tmp_path / "store"),
        "--runs",
        str(tmp_path / "runs"),
        "--json",
    ]
    code, out, err = answer(capfd, line)
    built = the_object(out)
    assert (code, built["status"], built["error"], built["findings"]) == (0, "built", None, [])
    assert built["path"] == str(tmp_path / "store" / "validate" / str(built["key"]))
    assert "100%" in err
    code, out, err = answer(capfd, [*line, "--quiet"])
    again = the_object(out)
    assert (code, again["status"], err) == (0, "up to date", "")
    assert {name: again[name] for name in ("key", "path", "digest", "counts")} == {
        name: built[name] for name in ("key", "path", "digest", "counts")
    }
    code, out, err = answer(capfd, line[:-1])
    assert (code, out) == (0, "")
    assert err.startswith("validate: up to date (images 12, accepted 12, items 12, rejected 0, warnings 0)")
    assert str(built["path"]) in err


def test_store_is_taken_from_the_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX2_LORA_STORE", str(tmp_path / "shared"))
    assert answer(capfd, ["validate", "-c", str(DEMO), "--runs", str(tmp_path / "runs"), "--quiet"])[0] == 0
    assert (tmp_path / "shared" / "validate").is_dir()


@pytest.mark.parametrize("name", ["validate", "encode-text", "train", "verify"])
def test_store_that_is_a_file_ends_with_7(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "store").write_text("")
    (tmp_path / "runs").write_text("")
    places = ["--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    code, out, err = answer(capfd, [name, "-c", str(DEMO), *places, "--json"])
    assert (code, the_object(out)["error"]["code"]) == (7, "disk.in_the_way")
    assert LINE.fullmatch(err.strip())


def test_names_from_outside_cannot_drive_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = answer(capfd, ["train", "--config", "\x1b[2Jx\n.toml", "--set", "a\u202e=1"])
    assert code == 2
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert "\\x1b[2Jx\\n.toml" in err


def test_exit_code_belongs_to_one_kind_of_error() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, StageError)]
    codes = {kind.exit_code: kind.__name__ for kind in kinds if kind is not errors.Stopped}
    assert codes == {
        1: "StageError",
        2: "BadConfig",
        3: "RejectedInput",
        4: "Damaged",
        5: "Stale",
        6: "Busy",
        7: "NoResources",
        8: "Diverged",
        9: "Untrusted",
    }


@pytest.mark.parametrize("code", [["-m", "stages"], ["-c", "from stages.cli import main; main()"]])
def test_module_and_program_are_the_same(code: list[str]) -> None:
    found = subprocess.run([sys.executable, *code, "trian"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (found.returncode, found.stdout) == (2, "")
    assert "fix: did you mean train?" in found.stderr


def bug(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which validate fails as nobody foresaw."""
    line = [sys.executable, "-c", BUG, "validate", "--config", str(DEMO), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


def test_bug_is_one_line_and_ends_with_1() -> None:
    found = bug()
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        "error[bug] LookupError: nobody foresaw this (<string>:6). fix: run with --debug and report it\n"
    )


def test_bug_is_one_object_for_programs() -> None:
    found = bug("--json")
    assert found.returncode == 1
    assert the_object(found.stdout)["error"]["code"] == "bug"
    assert "Traceback" not in found.stderr


def test_debug_shows_where_a_bug_and_an_error_came_from() -> None:
    found = bug("--debug")
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert found.stderr.count("nobody foresaw this") == 2
    found = process("validate", "--config", "none.toml", "--debug")
    assert found.returncode == 2
    assert "Traceback" in found.stderr
    assert "Traceback" not in process("validate", "--config", "none.toml").stderr


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version", f"validate -c {DEMO} --quiet --json"])
def test_reader_that_leaves_ends_the_program_without_a_word(tmp_path: Path, arguments: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "stages", *arguments.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path, env=env
    )
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")


def test_no_color_and_no_terminal_mean_no_escape_codes(tmp_path: Path) -> None:
    places = ["--store", tmp_path / "store", "--runs", tmp_path / "runs"]
    for environment in ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}, {}):
        found = process("validate", "-c", DEMO, *places, "--force", **environment)
        assert found.returncode == 0
        assert "\x1b[3" not in found.stderr
        assert "\x1b[1;3" not in found.stderr
        assert "images" in found.stderr
