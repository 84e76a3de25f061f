"""Configuration: every unknown name and wrong value refused, all in one run, each with where and the remedy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from schemas.errors import BadConfig, Fault
from schemas.run import Config
from schemas.train import Train
from stages.contract.config import MAX_BYTES, load_config, located

MINIMAL = '[validate]\ndataset = "pictures"\n'
DEEP = ".".join(["a"] * 20_000)


def load(folder: Path, text: str | bytes, *assignments: str) -> Config:
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, assignments)


def faults(folder: Path, text: str | bytes, *assignments: str) -> tuple[Fault, ...]:
    """Return what is refused; everything that is has a code, a place and a remedy."""
    with pytest.raises(BadConfig) as raised:
        load(folder, text, *assignments)
    assert raised.value.exit_code == 2
    for fault in raised.value.faults:
        assert fault.code.startswith("config.")
        assert fault.where
        assert fault.fix
        assert "\n" not in fault.line()
    return raised.value.faults


def codes(listed: Sequence[Fault]) -> list[str]:
    return [fault.code.removeprefix("config.") for fault in listed]


def test_only_the_dataset_must_be_given(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.validate.dataset == "pictures"
    assert config.train == Train()
    assert [(each.code, each.fix) for each in faults(tmp_path, "")] == [("config.missing", "add a table [validate]")]
    (fault,) = faults(tmp_path, "[validate]\n")
    assert (fault.what, fault.fix) == ("validate.dataset is missing", "add dataset to [validate]")


def test_pipelines_that_come_with_the_project_load() -> None:
    pipelines = sorted(Path(__file__).parents[2].glob("pipelines/*.toml"))
    assert len(pipelines) >= 3
    for path in pipelines:
        assert load_config(path).validate.dataset


@pytest.mark.parametrize("name", ["validate", "run", "model", "encode_latents", "encode_text", "train", "preview"])
def test_unknown_key_is_refused_in_every_table(tmp_path: Path, name: str) -> None:
    text = "[validate]\n" if name == "validate" else f"{MINIMAL}[{name}]\n"
    found = faults(tmp_path, f"{text}colour = 1\n")
    assert ("config.unknown_key", f"unknown setting {name}.colour") in [(each.code, each.what) for each in found]


def test_unknown_key_names_the_nearest_and_lists_the_valid_ones(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[train]\nlerning_rate = 1e-4\n")
    assert fault.what == "unknown setting train.lerning_rate"
    assert fault.fix == "did you mean train.learning_rate?"
    assert "train.batch_size" in fault.why
    assert fault.where == str(tmp_path / "run.toml")


def test_unknown_table_names_the_nearest(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[encode-latents]\ndtype = 'float32'\n")
    assert fault.fix == "did you mean encode_latents?"


def test_key_like_nothing_known_lists_the_valid_ones(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[encode_latents]\nxyzzy = 1\n")
    assert fault.fix == "valid: encode_latents.dtype, encode_latents.flip"


def test_names_of_the_schemas_own_machinery_are_no_settings(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[encode_text]\nNEUTRAL = 1\n")
    assert "NEUTRAL" not in fault.fix


def test_all_faults_of_a_file_are_reported_in_one_run(tmp_path: Path) -> None:
    text = (
        f"{MINIMAL}resolutions = [100]\n[run]\nname = 'Not a name'\nseed = -1\n"
        "[train]\nstepz = 1\nsteps = 'many'\nrank = 0\nalpha = true\nlearning_rate = nan\n"
        "[train.optimizer]\nkind = 'sdg'\n[preview]\nguidence = 2\nguidance = inf\n"
    )
    assert sorted((fault.code, fault.what) for fault in faults(tmp_path, text)) == [
        ("config.not_finite", "preview.guidance is not a finite number"),
        ("config.not_finite", "train.learning_rate is not a finite number"),
        ("config.unknown_key", "unknown setting preview.guidence"),
        ("config.unknown_key", "unknown setting train.stepz"),
        ("config.unknown_kind", "unknown kind for train.optimizer: sdg"),
        ("config.wrong_value", "run.name is wrong"),
        ("config.wrong_value", "run.seed is wrong"),
        ("config.wrong_value", "train.alpha is wrong"),
        ("config.wrong_value", "train.rank is wrong"),
        ("config.wrong_value", "train.steps is wrong"),
        ("config.wrong_value", "validate.resolutions[0] is wrong"),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("steps = '100'", "Expected int, got str, found '100'"),
        ("steps = 100.0", "Expected int, got float, found 100.0"),
        ("steps = true", "Expected int, got bool, found True"),
        ("steps = 0", "Expected int >= 1, found 0"),
        ("steps = [1]", "Expected int, got array, found [1]"),
        ("steps = 1979-05-27", "Expected int, got date, found datetime.date(1979, 5, 27)"),
        ("caption_dropout = 1.5", "Expected float <= 1.0, found 1.5"),
        ("caption_dropout = '0.1'", "Expected float, got str, found '0.1'"),
        ("save_dtype = 'fp8'", "Invalid enum value 'fp8', found 'fp8'"),
        ("compile = 1", "Expected bool, got int, found 1"),
        ("optimizer = 'adamw'", "got str, found 'adamw'"),
    ],
)
def test_wrong_value_says_what_was_expected_and_found(tmp_path: Path, line: str, why: str) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[train]\n{line}\n")
    assert fault.code == "config.wrong_value"
    assert fault.what == f"train.{line.split(' =')[0]} is wrong"
    assert fault.why.endswith(why)


def test_whole_numbers_are_good_floats(tmp_path: Path) -> None:
    assert load(tmp_path, f"{MINIMAL}[train]\nalpha = 16\n").train.alpha == 16.0


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "+nan"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, number: str) -> None:
    listed = faults(tmp_path, f"{MINIMAL}[train]\nalpha = {number}\n[train.timesteps]\nkind='shift'\nstd={number}\n")
    assert codes(listed) == ["not_finite", "not_finite"]
    assert [fault.what.split(" ")[0] for fault in listed] == ["train.alpha", "train.timesteps.std"]


def test_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[train.timesteps]\nkind = 'logit-normal'\n")
    assert (fault.code, fault.fix) == ("config.unknown_kind", "did you mean logit_normal?")
    assert "uniform" in fault.why


def test_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[train.timesteps]\nkind = 'uniform'\nstd = 1.0\n")
    assert fault.what == "unknown setting train.timesteps.std"


def test_table_that_does_not_say_its_kind_has_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, f"{MINIMAL}[train.optimizer]\nweight_decay = 0.5\n", "train.timesteps.std=2.0")
    assert config.train.optimizer == msgspec.structs.replace(Train().optimizer, weight_decay=0.5)
    assert config.train.timesteps == msgspec.structs.replace(Train().timesteps, std=2.0)


def test_set_overrides_and_adds_to_the_file(tmp_path: Path) -> None:
    text = f"{MINIMAL}[train]\nsteps = 10\nrank = 8\n"
    config = load(tmp_path, text, "train.steps=20", "train.rank=4", "train.rank=2", "preview.size=64")
    assert (config.train.steps, config.train.rank, config.preview.size) == (20, 2, 64)


@pytest.mark.parametrize(
    ("assignment", "found"),
    [
        ("validate.trigger=zorb", "zorb"),
        ("validate.trigger='zorb'", "zorb"),
        ('validate.trigger="zo\\u0072b"', "zorb"),
        ("validate.trigger=a cat, by the sea", "a cat, by the sea"),
        ("validate.trigger=[unclosed", "[unclosed"),
        ("validate.trigger=a=b", "a=b"),
        ("validate.trigger=", ""),
        ("validate.trigger='1'", "1"),
        ("validate.trigger=x\nskip_bad = true", "x\nskip_bad = true"),
        (" validate.trigger =zorb", "zorb"),
    ],
)
def test_set_takes_what_is_no_toml_literally_where_a_string_is_wanted(
    tmp_path: Path, assignment: str, found: str
) -> None:
    config = load(tmp_path, MINIMAL, assignment)
    assert (config.validate.trigger, config.validate.skip_bad) == (found, False)


def test_set_takes_lists_and_tables(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "preview.prompts=['a cat', \"a dog\"]",
        "validate.resolutions=[64, 128]",
        "train.timesteps={kind = 'logit_normal', mean = 0.5}",
        "train.timesteps.std=2",
        "encode_latents.flip=true",
    )
    assert config.preview.prompts == ("a cat", "a dog")
    assert config.validate.resolutions == (64, 128)
    assert (
        msgspec.to_builtins(config.train.timesteps).items()
        >= {"kind": "logit_normal", "mean": 0.5, "std": 2.0}.items()
    )
    assert config.encode_latents.flip


@pytest.mark.parametrize(
    "assignment", ["train.steps", "=1", "train.=1", ".steps=1", "train..steps=1", "", ".".join("a" * 17) + "=1"]
)
def test_set_that_is_no_assignment_is_refused(tmp_path: Path, assignment: str) -> None:
    (fault,) = faults(tmp_path, MINIMAL, assignment)
    assert (fault.code, fault.where) == ("config.bad_set", f"--set {assignment}")


def test_set_below_something_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, f"{MINIMAL}[train]\nsteps = 1\n", "train.steps.many=1")
    assert (fault.code, fault.what) == ("config.bad_set", "steps is not a table")


def test_fault_of_a_set_is_blamed_on_it_and_not_on_the_file(tmp_path: Path) -> None:
    listed = faults(tmp_path, f"{MINIMAL}[train]\nrank = 0\n", "train.steps=few", "train.stepz=1", "preview.size=1")
    assert {fault.what.split(" ")[-1 if "unknown" in fault.what else 0]: fault.where for fault in listed} == {
        "train.rank": str(tmp_path / "run.toml"),
        "train.steps": "--set train.steps=few",
        "train.stepz": "--set train.stepz=1",
        "preview.size": "--set preview.size=1",
    }


def test_absent_file_and_folder_are_named(tmp_path: Path) -> None:
    for path, code in (
        (tmp_path / "none.toml", "absent"),
        (tmp_path, "absent"),
        (tmp_path / ("x" * 300), "unreadable"),
    ):
        with pytest.raises(BadConfig) as raised:
            load_config(path)
        assert codes(raised.value.faults) == [code]
        assert raised.value.faults[0].where == str(path)


def test_file_too_large_is_refused_unparsed(tmp_path: Path) -> None:
    comment = "#" * MAX_BYTES + "\n"
    (fault,) = faults(tmp_path, MINIMAL + comment)
    assert fault.code == "config.too_large"
    assert load(tmp_path, MINIMAL + comment[len(MINIMAL) + 1 :]).validate.dataset == "pictures"


@pytest.mark.parametrize(
    "text",
    [
        f"{DEEP} = 1\n",
        f"{DEEP.replace('.', ' . ')} = 1\n",
        ".".join(["'a b'"] * 20_000) + " = 1\n",
        ".".join(['"a \\" b"'] * 20_000) + " = 1\n",
        f"[{DEEP}]\n",
        f"[[ {DEEP} ]]\n",
        f"x = {{{DEEP} = 1}}\n",
        f"x = {{a = 1, {DEEP} = 1}}\n",
        f"x = {'[' * 50_000}\n",
        f"x = {'{a = ' * 20_000}\n",
    ],
    ids=["bare", "spaced", "literal", "quoted", "table", "array", "inline", "second", "lists", "tables"],
)
def test_deep_nesting_is_refused_within_a_second(tmp_path: Path, text: str) -> None:
    started = time.monotonic()
    assert codes(faults(tmp_path, MINIMAL + text)) == ["too_deep"]
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "text", [f"{DEEP}=1", f"x={{{DEEP}=1}}", "x=" + "[" * 50_000], ids=["name", "value", "lists"]
)
def test_deep_nesting_by_set_is_refused_within_a_second(tmp_path: Path, text: str) -> None:
    started = time.monotonic()
    (fault,) = faults(tmp_path, MINIMAL, text)
    assert fault.code in ("config.bad_set", "config.too_deep")
    assert len(fault.line()) < 300
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("filling", ["a", "a.b ", "a. ", ", ", "{", '\\"', "[", " ", "a = {", "'"])
def test_long_text_costs_no_time(tmp_path: Path, filling: str) -> None:
    started = time.monotonic()
    (fault,) = faults(tmp_path, f'{MINIMAL}trigger = "{filling * (240_000 // len(filling))}"\n')
    assert fault.what == "validate.trigger is wrong"
    assert time.monotonic() - started < 1.0


def test_path_starts_at_the_file_or_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    base = tmp_path / "project"
    for name, path in (
        ("photos", base / "photos"),
        ("~/photos", tmp_path / "home" / "photos"),
        ("./~/photos", base / "~" / "photos"),
        ("/x/y", Path("/x/y")),
    ):
        assert located(name, base) == path
    assert located("~no-such-user/photos", base) == base / "~no-such-user" / "photos"


def test_prompt_of_many_short_sentences_is_no_deep_key(tmp_path: Path) -> None:
    prompt = "[trigger], " + ". ".join("abcdefghijklmnopqrstuvwxyz") + "."
    assert load(tmp_path, f'{MINIMAL}[preview]\nprompts = ["{prompt}"]\n').preview.prompts == (prompt,)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (MINIMAL.encode() + b'dataset = "other"\n', "overwrite"),
        (MINIMAL.encode() * 2, "twice"),
        (b"[validate\n", "line 1"),
        (b"dataset: pictures\n", "line 1"),
        (b"\0", "line 1"),
        (b'{"validate": {"dataset": "d"}}', "line 1"),
    ],
)
def test_what_is_no_toml_is_refused_with_the_place(tmp_path: Path, data: bytes, why: str) -> None:
    (fault,) = faults(tmp_path, data)
    assert fault.code == "config.not_toml"
    assert why in fault.why


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'[validate]\ndataset = "caf\xe9"\n', "a byte 0xe9 in line 2"),
        (MINIMAL.encode("utf-16"), "a byte 0xff in line 1"),
    ],
)
def test_what_is_not_utf8_is_refused_with_the_line_and_how_to_save_it(tmp_path: Path, data: bytes, why: str) -> None:
    (fault,) = faults(tmp_path, data)
    assert (fault.code, fault.why, fault.fix) == ("config.not_utf8", why, "save it as plain UTF-8")


def test_byte_order_mark_and_windows_lines_are_no_matter(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + f"{MINIMAL}[train]\nsteps = 3\n".replace("\n", "\r\n").encode()
    assert load(tmp_path, data) == load(tmp_path, MINIMAL, "train.steps=3")


def test_thousands_of_unknown_keys_are_listed_within_seconds(tmp_path: Path) -> None:
    text = MINIMAL + "".join(f"key{number} = 1\n" for number in range(5_000))
    started = time.monotonic()
    assert len(faults(tmp_path, text)) == 5_000
    assert time.monotonic() - started < 3.0
