"""bundle: what train needs goes along, whole and without the pictures, and is taken from whom one trusts."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stages.project import Project, contents, draw, edit, flip, new_project, truncate
from tests.test_command_line import process

SSH = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="signatures are made by ssh-keygen")
STAGES = ("validate", "encode-latents", "encode-text")


def command(*arguments: str | Path, cwd: Path) -> tuple[int, str]:
    done = process(*arguments, cwd=cwd)
    return done.returncode, done.stderr


def pack(project: Project, name: str = "cat.zip", *more: str) -> Path:
    output = project.root.parent / name
    ran = project.run("bundle", "--output", str(output), *more)
    assert ran.code == 0, ran.stderr
    return output


def unpack(bundle: Path, target: Path, *more: str) -> tuple[int, str]:
    return command("unbundle", bundle, "--output", target, *(more or ("--unsigned",)), cwd=bundle.parent)


def elsewhere(target: Path) -> Project:
    """The unpacked project, its configuration called pipeline.toml and its run as before."""

    class Unpacked(Project):
        @property
        def config(self) -> Path:
            return self.root / "pipeline.toml"

    return Unpacked(target)


def key(folder: Path, name: str) -> tuple[Path, str]:
    """Make an SSH key; return it and its line in a file of allowed signers."""
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path, f"{name} {path.with_suffix('.pub').read_text()}"


def test_bundle_trains_without_the_pictures_to_the_same_lora(project: Project, tmp_path: Path) -> None:
    bundle = pack(project)
    assert unpack(bundle, tmp_path / "far")[0] == 0
    far = elsewhere(tmp_path / "far")
    ran = far.make()
    assert [ran[stage].status for stage in STAGES] == ["up to date"] * 3
    assert ran["train"].status == "built"
    assert far.lora.read_bytes() == project.lora.read_bytes()
    assert not list(far.root.rglob("sources/**/*.png"))
    checked = far.run("verify")
    assert (checked.code, checked.counts["errors"]) == (0, 0)
    again = far.run("encode-latents", "--force")
    assert (again.code, again.error) == (5, "dataset.elsewhere")


def test_command_to_go_on_with_is_one_for_a_shell(untrained: Project, tmp_path: Path) -> None:
    said = unpack(pack(untrained), tmp_path / "my cat")[1]
    there = re.search(r"go on with: (cd .+) && flux2-lora train", said)
    assert there is not None
    assert subprocess.check_output([there[1] + " && ls"], shell=True, text=True).split() == [
        "pipeline.toml",
        "runs",
        "sources",
        "store",
    ]


def test_bundle_is_a_plain_zip_the_same_bytes_each_time_without_pictures_or_paths(untrained: Project) -> None:
    first, second = pack(untrained, "one.zip"), pack(untrained, "two.zip")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}
    data = first.read_bytes()
    assert str(untrained.root).encode() not in data
    for picture in untrained.pictures.glob("*.png"):
        assert picture.read_bytes()[200:400] not in data


def test_folder_and_file_unpack_to_the_same_project(untrained: Project, tmp_path: Path) -> None:
    assert unpack(pack(untrained), tmp_path / "one")[0] == 0
    assert unpack(pack(untrained, "folder"), tmp_path / "two")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bundle_names_no_folder_of_this_machine(own_model: Project) -> None:
    shutil.copytree(own_model.root / "model", own_model.root / "sibling")
    edit(own_model.root / "sibling" / "model_index.json", '"is_distilled": false', '"is_distilled": true')
    edit(own_model.config, 'source = "model"', f'source = "{own_model.root / "model"}"')
    edit(own_model.config, "[preview]", f'[preview]\ndistilled = "{own_model.root / "sibling"}"')
    with zipfile.ZipFile(pack(own_model)) as archive:
        text = archive.read("pipeline.toml").decode()
    assert str(own_model.root) not in text
    assert 'source = "flux2-micro"' not in text
    assert 'distilled = "sibling"' in text


def test_class_pictures_and_a_model_of_ones_own_come_along_by_name(own_model: Project, tmp_path: Path) -> None:
    draw(own_model.root / "cats", "tom", (9, 9, 9), "a cat")
    edit(own_model.config, "[train]", '[train.preservation]\nkind = "prior"\n\n[train]')
    edit(own_model.config, "[validate]", '[validate]\nclass_dataset = "cats"')
    own_model.make(*STAGES)
    assert unpack(pack(own_model), tmp_path / "far")[0] == 0
    far = elsewhere(tmp_path / "far")
    shutil.copytree(own_model.root / "model", far.root / "model")
    assert [each.status for each in far.make(*STAGES).values()] == ["up to date"] * 3


def test_bundle_before_its_stages_names_the_one_to_run(tmp_path: Path) -> None:
    fresh = new_project(tmp_path / "project")
    ran = fresh.run("bundle", "--output", str(tmp_path / "cat.zip"))
    assert (ran.code, ran.error) == (5, "input.missing")
    assert not (tmp_path / "cat.zip").exists()


@pytest.mark.parametrize("name", ["there.zip", "full", "no/such/folder.zip"])
def test_bundle_never_writes_over_a_folder(untrained: Project, name: str) -> None:
    (untrained.root / "there.zip").mkdir()
    (untrained.root / "full").mkdir()
    (untrained.root / "full" / "mine").touch()
    ran = untrained.run("bundle", "--output", str(untrained.root / name))
    assert (ran.code, ran.error) == (2, "bundle.output")


@pytest.mark.parametrize(
    "place", ["fragments/latents/*/c.*", "fragments/embeddings/*.parquet", "encode-text/*/*.parquet"]
)
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_damaged_record_is_never_bundled(
    untrained: Project, tmp_path: Path, place: str, harm: Callable[[Path], object]
) -> None:
    harm(next(untrained.store.glob(place)))
    ran = untrained.run("bundle", "--output", str(tmp_path / "cat.zip"))
    assert (ran.code, ran.error) == (4, "file.changed")
    assert not (tmp_path / "cat.zip").exists()
    # As the remedy says.
    assert untrained.run("repair").result["status"] == "failed"
    assert untrained.run("bundle", "--output", str(tmp_path / "cat.zip")).code == 0


def test_configuration_whose_name_is_no_run_s_comes_along_under_one(untrained: Project, tmp_path: Path) -> None:
    named = untrained.config.rename(untrained.root / "My Cat.toml")
    output = untrained.root.parent / "cat.zip"
    line = ["bundle", "--config", str(named), "--store", str(untrained.store), "--output", str(output)]
    assert command(*line, cwd=untrained.root)[0] == 0
    assert unpack(output, tmp_path / "far")[0] == 0
    assert (tmp_path / "far" / "runs" / "my-cat" / "validate.json").is_file()
