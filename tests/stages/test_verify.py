"""verify: silent about a whole run, every kind of damage found and listed, nothing written but the report."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from stages.inspection import files
from stages.inspection.findings import Inspection
from stages.stores.tensors import Tensor, load, save
from stages.training.loop import Line
from stages.training.recorder import Recorder
from tests.faults.mutants import resealed_checkpoint
from tests.stages.project import Project, Ran, draw, flip, listing, stop_after, truncate

Harm = Callable[[Path], None]


def codes(project: Project, *flags: str) -> list[str]:
    """Run verify and return the codes of its findings."""
    return [finding["code"] for finding in project.run("verify", *flags).result["findings"]]


def only(folder: Path, pattern: str) -> Path:
    """Return the one file that fits; of several, the first by name."""
    return sorted(folder.glob(pattern))[0]


def rewritten(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a LoRA again with other numbers."""
    file = load(path)
    path.unlink()
    tensors = {name: Tensor(each.dtype, change(each.data.copy())) for name, each in file.tensors.items()}
    save(path, tensors, file.metadata)


def test_whole_run_has_no_findings(project: Project) -> None:
    ran = project.run("verify")
    assert (ran.code, ran.status, ran.result["key"]) == (0, "built", None)
    assert (ran.counts["errors"], ran.counts["hints"], ran.result["findings"]) == (0, 0, [])
    assert ran.counts["checked"] > 30
    assert Path(ran.result["path"]) == (project.results / "verify.json").absolute()
    report = msgspec.json.decode((project.results / "verify.json").read_bytes())
    assert (report["errors"], report["depth"]) == (0, "default")
    assert ["--deep" in each or "--recompute" in each for each in report["not_checked"]] == [True] * 3


def test_nothing_is_written_but_the_report(project: Project) -> None:
    before = listing(project.root)
    assert project.run("verify").code == 0
    after = listing(project.root)
    report = "runs/cat/verify.json"
    assert {name for name in after if after[name] != before.get(name)} == {report, "runs/cat"}
    assert before.keys() | {report} == after.keys()


def test_quick_says_what_it_left_out(project: Project) -> None:
    flip(project.lora)
    ran = project.run("verify", "--quick")
    assert (ran.code, ran.counts["errors"]) == (0, 0)
    report = msgspec.json.decode((project.results / "verify.json").read_bytes())
    assert report["depth"] == "quick"
    assert sum("--quick" in each for each in report["not_checked"]) == 4


def test_folder_of_a_fragment_is_compared_with_its_own_files_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those of all fragments it would take the square of their number."""
    project.make("validate", "encode-latents", sets=("validate.resolutions=[32, 48]", "encode_latents.flip=true"))
    compare, compared = files.unlisted, dict[Path, int]()

    def counted(inspection: Inspection, folder: Path, listed: set[Path]) -> None:
        compared[folder] = len(listed)
        compare(inspection, folder, listed)

    monkeypatch.setattr(files, "unlisted", counted)
    project.run("verify", "--quick")
    latents = [count for folder, count in compared.items() if folder.parent.name == "latents"]
    assert len(latents) > 1
    assert set(latents) == {2}


PLACES = {
    "the LoRA": "runs/cat/cat.safetensors",
    "a checkpoint's copy": "runs/cat/checkpoint_2.safetensors",
    "a picture's copy": "runs/cat/preview_2.png",
    "the latest picture": "runs/cat/preview_latest.png",
    "the artifact's LoRA": "store/train/*/lora.safetensors",
    "a checkpoint's state": "store/checkpoints/*/2/state.safetensors",
    "a checkpoint's LoRA": "store/checkpoints/*/2/lora.safetensors",
    "a latent fragment": "store/fragments/latents/*/c.0.0.0.0",
    "a text fragment": "store/fragments/embeddings/*.parquet",
    "a stored picture": "store/fragments/previews/*.png",
    "the dataset's table": "store/validate/*/dataset.parquet",
    "the latents' index": "store/encode-latents/*/index.parquet",
    "the texts' index": "store/encode-text/*/index.parquet",
    "the pictures' index": "store/preview/*/index.json",
}


@pytest.mark.parametrize("place", PLACES)
def test_every_file_of_the_run_is_missed_measured_and_read(project: Project, place: str) -> None:
    path = only(project.root, PLACES[place])
    whole = path.read_bytes()
    for harm, code in ((flip, "file.changed"), (truncate, "file.size"), (Path.unlink, "file.missing")):
        harm(path)
        ran = project.run("verify")
        assert ran.code == 4, (place, code)
        named = [finding for finding in ran.result["findings"] if finding["where"].startswith(str(path))]
        assert code in [finding["code"] for finding in named], (place, code)
        assert all(finding["fix"] for finding in named)
        path.write_bytes(whole)
    assert project.run("verify").code == 0


@pytest.mark.parametrize("stage", ["validate", "encode-latents", "encode-text", "train", "preview"])
def test_changed_manifest_is_found(project: Project, stage: str) -> None:
    path = only(project.store, f"{stage}/*/manifest.json")
    flip(path)
    ran = project.run("verify")
    assert ran.code == 4
    assert ran.result["findings"][0]["code"].startswith("manifest.")
    path.unlink()
    assert project.run("verify").code == 5


def test_changed_or_lost_checkpoint_is_found(project: Project) -> None:
    """Of the last step too, which the pictures do not need: it is what a longer training resumes from."""
    for step in (4, 2):
        folder = only(project.store, f"checkpoints/*/{step}")
        flip(folder / "manifest.json")
        ran = project.run("verify")
        [finding] = ran.result["findings"]
        assert (ran.code, finding["where"]) == (4, str(folder / "manifest.json"))
        shutil.rmtree(folder)
        assert [each["code"] for each in project.run("verify").result["findings"]] == ["checkpoint.missing"] * (
            step == 2
        )


def test_every_checkpoint_of_a_training_that_is_not_finished_is_looked_at(project: Project) -> None:
    sets = ("train.learning_rate=2e-3", "train.steps=3", "train.checkpoint_every=1", "preview.during_training=false")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, signal.SIGTERM, patch)
        assert project.run("train", sets=sets).code == 143
    [folder] = [path.parent for path in (project.store / "checkpoints").glob("*/1")]
    flip(folder / "1" / "manifest.json")
    flip(folder / "2" / "state.safetensors")
    ran = project.run("verify")
    where = {finding["where"] for finding in ran.result["findings"] if finding["code"] != "train.unfinished"}
    assert (ran.code, where) == (4, {str(folder / "1" / "manifest.json"), str(folder / "2" / "state.safetensors")})
    resealed_checkpoint(folder / "2", contract=2)
    assert {"train.unfinished", "checkpoint.version"} == set(codes(project))


def test_all_faults_of_a_run_are_listed_at_once(project: Project) -> None:
    (project.results / "preview_0.png").unlink()
    truncate(project.results / "checkpoint_2.safetensors")
    flip(only(project.store, "fragments/latents/*/c.0.0.0.0"))
    draw(project.pictures, "ada", (1, 2, 3))
    ran = project.run("verify")
    found = sorted(finding["code"] for finding in ran.result["findings"])
    assert found == ["dataset.changed", "file.changed", "file.missing", "file.size"]
    assert (ran.code, ran.counts["errors"]) == (4, 4)
    assert ran.stderr.count("error[") == 4
    report = msgspec.json.decode((project.results / "verify.json").read_bytes())
    assert report["findings"] == ran.result["findings"]


def test_lora_that_does_nothing_is_found(project: Project) -> None:
    rewritten(project.lora, np.zeros_like)
    assert {"lora.zero", "lora.digest"} <= set(codes(project))


def test_lora_with_undefined_numbers_is_found(project: Project) -> None:
    # The bits of a bfloat16 NaN.
    rewritten(project.lora, lambda bits: np.full_like(bits, 0x7FC0))
    assert "lora.not_finite" in codes(project)


def test_changed_or_lost_picture_of_the_dataset_is_lineage(project: Project) -> None:
    draw(project.pictures, "ada", (1, 2, 3))
    (project.pictures / "bob.png").unlink()
    ran = project.run("verify")
    assert (ran.code, ran.error) == (5, "dataset.changed")
    assert [Path(finding["where"]).name for finding in ran.result["findings"]] == ["ada.png", "bob.png"]


def test_stages_made_from_each_other_s_older_results_are_lineage(project: Project) -> None:
    (project.pictures / "ada.txt").write_text("another caption")
    project.make("validate", "encode-text")
    ran = project.run("verify")
    assert (ran.code, ran.error) == (5, "chain.broken")
    where = [finding["what"] for finding in ran.result["findings"]]
    assert any("train" in what and "encode-text" in what for what in where)


def test_pictures_of_an_older_lora_are_lineage(project: Project) -> None:
    assert project.run("train", sets=("train.learning_rate=2e-3", "preview.prompts=[]")).code == 5
    project.make("train", sets=("train.learning_rate=2e-3",))
    ran = project.run("verify")
    assert (ran.code, ran.error) == (5, "chain.broken")
    assert "preview" in ran.result["error"]["what"]


def test_training_begun_anew_and_not_finished_is_lineage_not_damage(project: Project) -> None:
    sets = ("train.learning_rate=2e-3", "train.steps=3", "train.checkpoint_every=1", "preview.during_training=false")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, signal.SIGTERM, patch)
        assert project.run("train", sets=sets).code == 143
    ran = project.run("verify")
    assert (ran.code, [finding["code"] for finding in ran.result["findings"]]) == (5, ["train.unfinished"])


def test_training_that_is_extended_meanwhile_is_no_damage(project: Project) -> None:
    record, found = Recorder.line, list[Ran]()

    def line(recorder: Recorder, line: Line) -> None:
        record(recorder, line)
        if line["step"] == 7:
            found.append(project.run("verify"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "line", line)
        project.make("train", sets=("train.steps=8",))
    [ran] = found
    assert (ran.code, ran.counts["errors"]) == (0, 0), ran.stderr
    assert "what the training under way writes into the run folder" in ran.stderr


def test_loras_of_an_older_training_are_a_hint_and_said_before_another_begins(project: Project) -> None:
    sets = ("train.rank=2", "train.steps=1")
    assert "of an older training" not in project.run("train", sets=("train.steps=5",)).stderr
    ran = project.make("train", "preview", sets=sets)["train"]
    assert ran.stderr.count("of an older training") == 1
    assert "checkpoint_2.safetensors, checkpoint_4.safetensors, checkpoint_5.safetensors\n" in ran.stderr
    ran = project.run("verify", sets=sets)
    assert (ran.code, [finding["code"] for finding in ran.result["findings"]]) == (0, ["train.copies_of_others"])
    assert "checkpoint_2.safetensors, checkpoint_4.safetensors, " in ran.result["findings"][0]["what"]
    for step in range(10, 13):
        shutil.copy(project.results / "checkpoint_2.safetensors", project.results / f"checkpoint_{step}.safetensors")
    [finding] = project.run("verify", sets=sets).result["findings"]
    assert finding["what"].endswith(
        "checkpoint_5.safetensors, checkpoint_10.safetensors, checkpoint_11.safetensors, and 1 more"
    )
    for step in (2, 4, 5, *range(10, 13)):
        (project.results / f"checkpoint_{step}.safetensors").unlink()
    assert codes(project) == []


def test_changed_model_is_lineage(own_model: Project) -> None:
    own_model.make("train", "preview", sets=("train.steps=1",))
    assert own_model.run("verify").code == 0
    flip(own_model.root / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    ran = own_model.run("verify")
    assert (ran.code, [finding["code"] for finding in ran.result["findings"]]) == (5, ["model.changed"])


def test_run_whose_model_is_gone_is_judged_without_it(own_model: Project) -> None:
    own_model.make("train", "preview", sets=("train.steps=1",))
    shutil.rmtree(own_model.root / "model")
    ran = own_model.run("verify")
    report = msgspec.json.decode((own_model.results / "verify.json").read_bytes())
    assert ran.code == 0
    assert any(line.startswith("the model's files") for line in report["not_checked"])


def test_run_that_never_was_names_every_stage(project: Project) -> None:
    ran = project.run("verify", sets=("run.name=other",))
    assert (ran.code, [finding["code"] for finding in ran.result["findings"]]) == (5, ["stage.not_run"] * 5)


def test_moved_project_is_whole(project: Project, tmp_path: Path) -> None:
    shutil.move(project.root, tmp_path / "moved")
    assert Project(tmp_path / "moved").run("verify").code == 0


def report(project: Project) -> dict[str, Any]:
    return msgspec.json.decode((project.results / "verify.json").read_bytes())


def reads(project: Project, *flags: str) -> set[str]:
    """Return the files whose flipped bit such a verify finds."""
    found = set()
    for path in sorted((project.store / "fragments").rglob("*")):
        if path.is_file():
            whole = path.read_bytes()
            flip(path)
            if project.run("verify", *flags).code:
                found.add(path.name if path.suffix else path.parent.name)
            path.write_bytes(whole)
    return found


def test_parts_of_a_subset_are_different_and_together_everything(project: Project) -> None:
    parts = [reads(project, "--subset", f"{number}/3") for number in (1, 2, 3)]
    everything = reads(project)
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)
    assert all(part < everything for part in parts)


def test_share_of_all_files_is_a_whole_verify(project: Project) -> None:
    assert reads(project, "--subset", "100%") == reads(project)
    assert report(project)["depth"] == "default"


def test_deep_reads_every_record_and_the_captions(project: Project) -> None:
    ran = project.run("verify", "--deep")
    assert (ran.code, ran.result["findings"]) == (0, [])
    assert ran.counts["checked"] > project.run("verify").counts["checked"]
    (project.pictures / "ada.txt").write_text("another caption")
    assert project.run("verify").code == 0
    ran = project.run("verify", "--deep")
    assert (ran.code, ran.error, ran.counts["errors"]) == (5, "dataset.changed", 1)
    assert ran.result["error"]["where"].endswith("ada.png")
    assert report(project)["depth"] == "deep"


def test_records_made_again_are_equal_to_the_bit_and_counted(project: Project) -> None:
    ran = project.run("verify", "--recompute", "100%")
    again = {"latents_equal": 4, "embeddings_equal": 6, "steps_equal": 4}
    assert (ran.code, report(project)["recomputed"]) == (0, again)
    project.run("verify", "--recompute", "1%")
    assert report(project)["recomputed"] == dict.fromkeys(again, 1)
    assert report(project)["depth"] == "default, recompute 1%"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("stages.encode_latents._latent", ("--recompute", "100%")),
        ("stages.encode_text._embedding", ("--recompute", "100%")),
        ("stages.dataset.items.build_items", ("--deep",)),
        ("stages.inspection.records._values", ("--deep",)),
    ],
)
def test_stop_ends_verify_wherever_it_is(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(name, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ran = project.run("verify", *flags)
    assert (ran.code, ran.error) == (130, "run.stopped")
    assert not (project.results / "verify.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--subset", "4/3"), "neither part n/t nor a share"),
        (("--subset", "0/3"), "neither part n/t nor a share"),
        (("--subset", "0%"), "is no share"),
        (("--recompute", "5"), "is no share"),
        (("--recompute", "101%"), "is no share"),
        (("--quick", "--deep"), "exclude each other"),
        (("--quick", "--recompute", "5%"), "exclude each other"),
    ],
)
def test_depth_that_is_none_is_a_usage_error(project: Project, flags: tuple[str, ...], said: str) -> None:
    ran = project.run("verify", *flags)
    assert (ran.code, ran.error) == (2, "usage")
    assert said in ran.stderr
