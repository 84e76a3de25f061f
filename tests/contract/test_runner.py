"""The runner: work once, only when needed, never half; every case with a real stage on a real disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import BadConfig, Busy, Damaged, NoResources, Stale
from stages.contract import runner
from stages.contract.artifacts import find, missing_files, read_manifest, read_receipt
from stages.contract.job import Flags, Job
from stages.contract.publish import workspace
from stages.contract.runner import upstream
from tests.contract.dying import deaths
from tests.contract.toy import FRAGMENT, Toy, run_toy, toy_job

ROOT = Path(__file__).parents[2]
DIE = """
from pathlib import Path
from tests.contract.toy import run_toy, toy_job
job = toy_job(Path(sys.argv[2]))
_die_at(int(sys.argv[1]))
run_toy(job)
"""
RUN = """
import sys
from pathlib import Path
from schemas.errors import StageError
from stages.contract.job import Flags
from tests.contract.toy import Toy, run_toy, toy_job
folder, run, blocks, wait = sys.argv[1:]
try:
    outcome = run_toy(toy_job(Path(folder), run=run, flags=Flags(wait=bool(wait))), Toy(blocks=bool(blocks)))
except StageError as error:
    sys.stderr.write(error.faults[0].line() + "\\n")
    sys.exit(error.exit_code)
print("built" if outcome.built else "up to date")
"""


def process(folder: Path, run: str, *, blocks: str = "", wait: str = "") -> subprocess.Popen[str]:
    """Start a process that runs the toy stage; with `blocks` it says "building" and goes on when told a line."""
    command = [sys.executable, "-c", RUN, str(folder), run, blocks, wait]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def building(folder: Path) -> subprocess.Popen[str]:
    """Start a process and return it in the middle of its work, for the run "cat"."""
    worker = process(folder, "cat", blocks="yes")
    assert worker.stdout is not None
    assert worker.stdout.readline() == "building\n"
    return worker


def whole(folder: Path) -> list[str]:
    """Return the keys of all artifacts, each proved whole, and prove that the receipt names one of them."""
    keys = []
    for artifact in (folder / "store" / "toy").glob("*"):
        manifest = read_manifest(artifact)
        assert missing_files(manifest, artifact, [folder / "store"]) == []
        keys.append(artifact.name)
    receipt = read_receipt(folder / "runs" / "cat", "toy")
    assert receipt is None or receipt.key in keys
    return keys


def times(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of every file of the store's artifacts and of the run."""
    paths = [path for below in ("store/toy", "store/fragments", "runs") for path in (folder / below).rglob("*")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_stage_is_built_once_and_then_up_to_date(tmp_path: Path) -> None:
    stage = Toy()
    first = run_toy(toy_job(tmp_path), stage)
    second = run_toy(toy_job(tmp_path), stage)
    assert (first.built, second.built, stage.built) == (True, False, 1)
    assert first.folder == second.folder == tmp_path / "store" / "toy" / first.manifest.key
    assert (first.counts, second.counts) == ({"total": 2, "encoded": 2}, {"total": 2, "encoded": 0})
    assert (tmp_path / "runs" / "cat" / "word.txt").read_text() == "zorb"
    receipt = read_receipt(tmp_path / "runs" / "cat", "toy")
    assert receipt is not None
    assert (receipt.key, receipt.digest) == (first.manifest.key, first.manifest.digest)


def test_up_to_date_stage_touches_nothing(tmp_path: Path) -> None:
    run_toy(toy_job(tmp_path))
    before = times(tmp_path)
    run_toy(toy_job(tmp_path))
    assert times(tmp_path) == before
    assert len(before) > 5


def test_changed_setting_or_input_is_built_beside_the_old(tmp_path: Path) -> None:
    keys = [run_toy(toy_job(tmp_path)).manifest.key, run_toy(toy_job(tmp_path, "blip")).manifest.key]
    (tmp_path / "source").write_text("other pixels")
    keys.append(run_toy(toy_job(tmp_path)).manifest.key)
    assert len(set(keys)) == 3
    assert sorted(whole(tmp_path)) == sorted(keys)
    (tmp_path / "source").write_text("pixels")
    again = run_toy(toy_job(tmp_path))
    assert (again.built, again.manifest.key) == (False, keys[0])
    receipt = read_receipt(tmp_path / "runs" / "cat", "toy")
    assert receipt is not None
    assert receipt.key == keys[0]


def test_new_version_of_a_stage_is_another_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_toy(toy_job(tmp_path))
    monkeypatch.setattr(Toy, "version", 2)
    after = run_toy(toy_job(tmp_path))
    assert after.built
    assert after.manifest.key != before.manifest.key


@pytest.mark.parametrize("flag", ["explain", "wait", "quiet", "resume_only", "quick", "paranoid", "force"])
def test_no_flag_moves_the_key(tmp_path: Path, flag: str) -> None:
    before = run_toy(toy_job(tmp_path))
    after = run_toy(toy_job(tmp_path, flags=Flags(**{flag: True})))
    assert after.manifest.key == before.manifest.key
    assert after.built == (flag == "force")


def test_neither_run_nor_place_is_in_the_key(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = run_toy(toy_job(tmp_path)), run_toy(toy_job(tmp_path / "elsewhere", run="dog"))
    assert here.manifest.key == there.manifest.key
    assert here.manifest.digest == there.manifest.digest
    assert str(tmp_path) not in (here.folder / "manifest.json").read_text()


def test_force_builds_again_and_leaves_an_equal_artifact(tmp_path: Path) -> None:
    run_toy(toy_job(tmp_path))
    receipt = (tmp_path / "runs" / "cat" / "toy.json").stat()
    stage = Toy()
    assert run_toy(toy_job(tmp_path, flags=Flags(force=True)), stage).built
    assert stage.built == 1
    assert len(whole(tmp_path)) == 1
    assert (tmp_path / "runs" / "cat" / "toy.json").stat().st_mtime_ns == receipt.st_mtime_ns


def _cut(artifact: Path) -> None:
    (artifact / "word").write_text("zor")


def _emptied(artifact: Path) -> None:
    shutil.rmtree(artifact / "inner")


def _edited(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace("zorb", "blob"))


def _fragmentless(artifact: Path) -> None:
    (artifact.parents[1] / FRAGMENT).unlink()


def _without_manifest(artifact: Path) -> None:
    (artifact / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [_cut, _emptied, _edited, _fragmentless])
def test_damaged_artifact_is_announced_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    folder = run_toy(toy_job(tmp_path)).folder
    damage(folder)
    healed = run_toy(toy_job(tmp_path))
    assert healed.built
    assert "again" in capsys.readouterr().err
    assert whole(tmp_path) == [folder.name]
    assert (folder / "word").read_text() == "zorb"
    assert not run_toy(toy_job(tmp_path)).built


def test_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    folder = run_toy(toy_job(tmp_path)).folder
    _without_manifest(folder)
    assert find("toy", folder.name, [tmp_path / "store"]) is None
    assert run_toy(toy_job(tmp_path)).built
    assert whole(tmp_path) == [folder.name]


def test_lost_result_and_receipt_come_back_without_work(tmp_path: Path) -> None:
    run_toy(toy_job(tmp_path))
    shutil.rmtree(tmp_path / "runs")
    assert not run_toy(toy_job(tmp_path)).built
    assert sorted(path.name for path in (tmp_path / "runs" / "cat").iterdir()) == ["toy.json", "word.txt"]


def test_edited_result_is_restored(tmp_path: Path) -> None:
    run_toy(toy_job(tmp_path))
    (tmp_path / "runs" / "cat" / "word.txt").write_text("brzo")
    assert not run_toy(toy_job(tmp_path)).built
    assert (tmp_path / "runs" / "cat" / "word.txt").read_text() == "zorb"


def test_artifact_of_another_store_is_used_and_not_copied(tmp_path: Path) -> None:
    run_toy(toy_job(tmp_path))
    (tmp_path / "store").rename(tmp_path / "theirs")
    before = times(tmp_path / "theirs")
    outcome = run_toy(toy_job(tmp_path, run="dog", also="theirs"))
    assert not outcome.built
    assert outcome.folder.is_relative_to(tmp_path / "theirs")
    assert not (tmp_path / "store" / "toy").exists()
    assert times(tmp_path / "theirs") == before
    assert (tmp_path / "runs" / "dog" / "word.txt").read_text() == "zorb"


def test_artifact_missing_in_both_stores_is_built_into_ours(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    outcome = run_toy(toy_job(tmp_path, also="theirs"))
    assert outcome.folder.is_relative_to(tmp_path / "store")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_explain_lists_the_settings_and_inputs_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = Flags(explain=True)
    run_toy(toy_job(tmp_path, flags=flags))
    assert "has not made it before" in capsys.readouterr().err
    run_toy(toy_job(tmp_path, flags=flags))
    assert "nothing changed" in capsys.readouterr().err
    (tmp_path / "source").write_text("other pixels")
    key = run_toy(toy_job(tmp_path, "blip", flags=flags)).manifest.key
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == f"toy: key {key}"
    assert lines[1].startswith("source: ")
    assert lines[2:] == ["word: zorb -> blip"]


def test_explain_survives_a_lost_or_damaged_past(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_toy(toy_job(tmp_path)).folder
    _edited(folder)
    assert run_toy(toy_job(tmp_path, "blip", flags=Flags(explain=True))).built
    assert "is damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "store" / "toy")
    assert run_toy(toy_job(tmp_path, flags=Flags(explain=True))).built
    assert "is gone" in capsys.readouterr().err


def test_failed_build_publishes_nothing_and_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_self: Toy, _job: Job, _plan: object, work: Path) -> None:
        (work / "half").write_text("half")
        raise Damaged("toy.broken", "broken")

    monkeypatch.setattr(Toy, "build", fails)
    with pytest.raises(Damaged):
        run_toy(toy_job(tmp_path))
    assert whole(tmp_path) == []
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_second_process_of_a_run_is_busy_and_told_who_works(tmp_path: Path) -> None:
    worker = building(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    try:
        # By whatever path it is named.
        for runs in (tmp_path / "runs", tmp_path / "link", tmp_path / "store" / ".." / "runs"):
            with pytest.raises(Busy, match=f"pid {worker.pid}"):
                run_toy(replace(toy_job(tmp_path, "blip"), runs=runs))
        second = process(tmp_path, "cat")
        assert second.communicate()[1].startswith("error[lock.held]")
        assert second.returncode == 6
    finally:
        output, _ = worker.communicate("go on\n")
    assert (worker.returncode, output) == (0, "built\n")
    assert not run_toy(toy_job(tmp_path)).built


def test_waiting_process_finds_the_work_done(tmp_path: Path) -> None:
    worker = building(tmp_path)
    same, other = process(tmp_path, "cat", wait="yes"), process(tmp_path, "dog")
    for each in (same, other):
        assert each.stderr is not None
        assert each.stderr.readline().startswith(f"waiting for pid {worker.pid} on ")
    assert worker.communicate("go on\n")[0] == "built\n"
    assert [each.communicate()[0] for each in (same, other)] == ["up to date\n", "up to date\n"]
    assert len(whole(tmp_path)) == 1
    assert (tmp_path / "runs" / "dog" / "word.txt").read_text() == "zorb"


def test_another_run_with_other_settings_works_at_the_same_time(tmp_path: Path) -> None:
    worker = building(tmp_path)
    try:
        assert run_toy(toy_job(tmp_path, "blip", run="dog")).built
    finally:
        worker.communicate("go on\n")
    assert len(whole(tmp_path)) == 2


def test_process_killed_in_the_middle_leaves_no_lock_and_no_litter(tmp_path: Path) -> None:
    worker = building(tmp_path)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert whole(tmp_path) == []
    assert run_toy(toy_job(tmp_path)).built
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


def test_killed_at_any_moment_nothing_is_half_published_and_the_next_run_heals(tmp_path: Path) -> None:
    killed, left = 0, set()
    toy_job(tmp_path)
    for _ in deaths(DIE, [str(tmp_path)], every=6):
        killed += 1
        left.add(len(whole(tmp_path)))
        run_toy(toy_job(tmp_path))
        assert len(whole(tmp_path)) == 1
        results = {path.name: path.read_text() for path in (tmp_path / "runs" / "cat").iterdir()}
        assert sorted(results) == ["toy.json", "word.txt"]
        assert results["word.txt"] == "zorb"
        with workspace(tmp_path / "store"):
            pass
        assert all(path.suffix == ".new" for path in (tmp_path / "store" / ".tmp").iterdir())
        shutil.rmtree(tmp_path / "store")
        shutil.rmtree(tmp_path / "runs")
    assert killed > 10
    assert left == {0, 1}


def test_store_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(NoResources, match=r"disk\.in_the_way"):
        run_toy(toy_job(tmp_path))


def test_run_folder_that_is_a_file_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(NoResources, match=r"disk\.in_the_way"):
        run_toy(toy_job(tmp_path))
    assert not (tmp_path / "store" / "toy").exists()


def test_upstream_that_never_ran_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "load_stage", lambda _: Toy())
    with pytest.raises(Stale) as raised:
        upstream(toy_job(tmp_path), "toy")
    fault = raised.value.faults[0]
    assert (raised.value.exit_code, fault.code) == (5, "input.missing")
    assert fault.fix == f"flux2-lora toy --config {tmp_path / 'cat.toml'}"


def test_upstream_that_ran_on_other_inputs_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "load_stage", lambda _: Toy())
    outcome = run_toy(toy_job(tmp_path))
    assert upstream(toy_job(tmp_path), "toy") == (outcome.manifest, outcome.folder)
    with pytest.raises(Stale, match=r"input\.stale"):
        upstream(toy_job(tmp_path, "blip"), "toy")


def test_damaged_upstream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "load_stage", lambda _: Toy())
    _edited(run_toy(toy_job(tmp_path)).folder)
    with pytest.raises(Damaged, match=r"manifest\.altered"):
        upstream(toy_job(tmp_path), "toy")


def test_provenance_names_versions_and_is_in_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_toy(toy_job(tmp_path)).manifest
    assert before.provenance["python"] == sys.version.split()[0]
    assert {"flux2-lora", "numpy", "seconds"} <= set(before.provenance)
    monkeypatch.setattr(runner, "PACKAGES", ("no-such-package",))
    after = run_toy(toy_job(tmp_path, flags=Flags(force=True))).manifest
    assert not {"numpy", "no-such-package"} & set(after.provenance)
    assert after.key == before.key


def test_run_is_named_by_the_table_or_the_file(tmp_path: Path) -> None:
    job = toy_job(tmp_path, run="dog")
    assert job.run_folder == tmp_path / "runs" / "dog"


@pytest.mark.parametrize("dataset", ["none", "source", "x" * 300, "nul\0"])
def test_dataset_that_is_no_folder_is_an_error_of_the_configuration(tmp_path: Path, dataset: str) -> None:
    job = toy_job(tmp_path)
    config = type(job.config)(validate=type(job.config.validate)(dataset=dataset))
    with pytest.raises(BadConfig, match=r"dataset\.absent.*validate\.dataset"):
        _ = replace(job, config=config).dataset


def test_relative_dataset_starts_from_the_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    apart = tmp_path.with_name("apart")
    assert replace(toy_job(tmp_path), store=apart, runs=apart).dataset == tmp_path


def test_stages_are_found_by_name() -> None:
    for name in runner.STAGES[:-1]:
        assert runner.load_stage(name).name == name
        assert isinstance(runner.load_stage(name).version, int)
