"""report: one page that shows what a run left, whatever state it is in, and changes nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import click
import msgspec
import pytest
from PIL import Image

from stages.contract.locks import hold
from stages.flux2.backend import prepare
from tests.faults import mutants
from tests.pages.reading import Reading
from tests.stages.project import Project, Ran, command, draw, edit, flip, listing, new_project, stop_after, truncate

EVIL = """</script><script>alert("1")</script><img src=x onerror=alert(1)> & 'so' "on" {{ 7 * 7 }}"""


def report(project: Project, *more: str, config: bool = True) -> Ran:
    """Run the command as a person would; with `config` it knows where the pictures are."""
    places = ["--store", str(project.store), "--runs", str(project.root / "runs"), "--json"]
    named = ["--config", str(project.config)] if config else []
    return command("report", project.name, *places, *named, *more)


def read(ran: Ran) -> Reading:
    assert ran.code == 0, ran.stderr
    return Reading(Path(ran.result["path"]).read_text(encoding="utf-8"))


def remarks(page: Reading) -> list[str]:
    return [each.text for each in page.all("ul", "remarks")]


def last_step(project: Project) -> int:
    return msgspec.json.decode((project.results / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]


def test_page_shows_all_that_a_run_left(project: Project) -> None:
    assert project.run("verify").code == 0
    ran = report(project)
    page = read(ran)
    assert Path(ran.result["path"]) == project.results / "report.html"
    size = (project.results / "report.html").stat().st_size
    assert ran.counts == {"previews": 3, "pictures": 4, "curves": 5, "bytes": size}
    assert page.one("h1").text == "cat"
    assert page.one("div", "control").attributes["data-steps"] == "0 2 4"
    assert [each.attributes["data-step"] for each in page.all("button") if "data-step" in each.attributes] == [
        "0", "2", "4",
    ]  # fmt: skip
    assert page.one("figcaption", "prompt").text == "a red zorb"
    assert "a zorb called ada" in page.one("ul", "contact").text
    assert ["train.rank", "4", "16"] in [each.pieces for each in page.all("tr")]
    assert [each.text for each in page.all("h3")] == [
        "LoRA", "Previews", "Embeddings", "Latents", "Dataset",
    ]  # fmt: skip
    assert remarks(page) == []


def test_page_reaches_nothing_outside_itself(project: Project) -> None:
    page = read(report(project))
    assert [each for each in page.reached if not each.startswith(("data:", "#"))] == []
    assert len(page.scripts) == 1
    assert page.handlers == []
    assert [each for each in page.all("img") if "alt" not in each.attributes] == []
    assert "://" not in (project.results / "report.html").read_text(encoding="utf-8")


def test_links_in_the_page_lead_somewhere(project: Project) -> None:
    page = read(report(project))
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    assert {each.attributes["href"] for each in page.all("a")} <= {f"#{each}" for each in ids}


def test_digests_are_those_of_the_chain(project: Project) -> None:
    page = read(report(project))
    shown = [each.text for each in page.all("code", "digest")]
    for stage in ("validate", "encode-latents", "encode-text", "train", "preview"):
        receipt = msgspec.json.decode((project.results / f"{stage}.json").read_bytes())
        assert receipt["digest"] in shown
    assert "another than the run has now" not in page.one("ol", "chain").text
    [lora] = (project.store / "checkpoints").glob("*/2/manifest.json")
    assert msgspec.json.decode(lora.read_bytes())["lora"] in shown


def test_what_computed_is_named_for_each_stage_that_did(project: Project) -> None:
    page = read(report(project))
    said = [each.text for each in page.all("p", "software") if "computed on" in each.text]
    assert said == [f"encode-latents, encode-text, train: computed on {prepare().name}"]


def test_run_from_before_devices_were_recorded_has_a_page(project: Project) -> None:
    for stage in ("encode-latents", "encode-text", "train"):
        folder = mutants.artifact(project, stage)
        about = mutants.manifest_of(folder).provenance
        mutants.resealed(folder, provenance={name: about[name] for name in about if name != "device"})
    page = read(report(project))
    assert [each.text for each in page.all("p", "software") if "computed on" in each.text] == []


def test_link_that_is_broken_is_marked(project: Project) -> None:
    edit(project.pictures / "ada.txt", "called ada", "called eve")
    project.make("validate", "encode-text")
    chain = read(report(project)).all("li", "found")
    assert sorted(each.pieces[0] for each in chain) == ["caption", "items", "pictures"]
    assert {each.pieces[-1] for each in chain} == {"another than the run has now"}


def test_report_changes_nothing_and_comes_out_the_same(project: Project) -> None:
    before = listing(project.root)
    report(project, "--output", str(project.root / "page.html"))
    after = listing(project.root, "page.html")
    assert after == before
    first = (project.root / "page.html").read_bytes()
    report(project, "--output", str(project.root / "page.html"))
    assert (project.root / "page.html").read_bytes() == first


def test_whatever_people_write_is_shown_as_text(tmp_path: Path) -> None:
    project = new_project(tmp_path)
    draw(project.pictures, 'x" onerror="alert(1)', (9, 9, 9), EVIL)
    edit(project.config, '["a red [trigger]"]', f"['''{EVIL}''']")
    project.make()
    page = read(report(project))
    assert f"zorb {EVIL}" in [each.text for each in page.all("p")]
    assert page.one("figcaption", "prompt").text == EVIL
    assert len([each for each in page.all("img") if EVIL in (each.attributes["alt"] or "")]) == 4
    assert len(page.scripts) == 1
    assert page.handlers == []
    assert [each for each in page.reached if not each.startswith(("data:", "#"))] == []


def test_pictures_that_changed_or_went_are_said_to_have(project: Project) -> None:
    (project.pictures / "ada.png").unlink()
    flip(project.pictures / "bob.png")
    (project.pictures / "cyd.png").write_bytes(b"")
    ran = report(project)
    said = [each.text for each in read(ran).all("div", "gone")]
    assert said == ["cannot read the picture", "the picture was changed since", "the picture was changed since"]
    assert ran.counts["pictures"] == 1


def test_without_the_pipeline_captions_are_shown_and_the_page_says_how_to_see_pictures(project: Project) -> None:
    ran = report(project, config=False)
    page = read(ran)
    assert ran.counts["pictures"] == 0
    assert "a zorb called ada" in page.one("ul", "contact").text
    assert "name the pipeline's file with --config" in "".join(remarks(page))
    # `run` leaves the pipeline where it is found.
    text = project.config.read_text().replace('"pictures"', '"../../pictures"')
    (project.results / "pipeline.toml").write_text(text)
    assert report(project, config=False).counts["pictures"] == 4


def test_pictures_in_the_home_folder_are_shown(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(project.config, '"pictures"', '"~/pictures"')
    monkeypatch.setenv("HOME", str(project.root))
    assert report(project).counts["pictures"] == 4


def test_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    project = new_project(tmp_path)
    project.make("validate")
    ran = report(project)
    page = read(ran)
    assert ran.counts["pictures"] == 4
    assert "Training has not begun" in "".join(remarks(page))
    assert [each.attributes["id"] for each in page.all("section")] == ["dataset", "settings", "chain", "timings"]


def test_training_that_was_stopped_has_a_page(untrained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(untrained.config, "steps = 4", "steps = 8")
    with monkeypatch.context() as patch:
        # The pictures of the step it is stopped at are left to preview.
        stop_after(3, signal.SIGTERM, patch)
        assert untrained.run("train").code == 143
    ran = report(untrained)
    page = read(ran)
    assert f"Training is not finished: step {last_step(untrained)} of 8." in "".join(remarks(page))
    assert page.one("figcaption", "prompt").text == "a red zorb"
    assert page.one("div", "control").attributes["data-steps"] == "0 2"
    assert ["train.rank", "4", "16"] in [each.pieces for each in page.all("tr")]
    with hold(untrained.results / ".control.lock", wait=False, waiting=print):
        assert f"Training is under way: step {last_step(untrained)} of 8." in "".join(
            remarks(read(report(untrained)))
        )


def test_settings_of_a_new_training_are_shown_in_the_old_ones_folder(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(1, signal.SIGTERM, patch)
        assert project.run("train", sets=("train.rank=2",)).code == 143
    page = read(report(project))
    assert f"Training is not finished: step {last_step(project)} of 4." in "".join(remarks(page))
    assert ["train.rank", "2", "16"] in [each.pieces for each in page.all("tr")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/cat/metrics.jsonl", "There are no metrics."),
        ("runs/cat/verify.json", "verify.json cannot be read"),
        ("runs/cat/trajectory.json", "trajectory.json cannot be read"),
        ("store/train/*/manifest.json", "What train made cannot be read"),
        ("store/validate/*/dataset.parquet", "The dataset cannot be shown"),
        ("store/validate/*/report.json", "The dataset cannot be shown"),
        ("store/preview/*/manifest.json", "What preview made cannot be read"),
        ("runs/cat/preview_2.png", "Previews that cannot be read: preview_2.png."),
    ],
)
def test_damage_is_a_remark(project: Project, name: str, said: str) -> None:
    assert project.run("verify").code == 0
    [path] = project.root.glob(name)
    for spoil in (truncate, lambda path: path.write_bytes(b"\xff\x00")):
        spoil(path)
    assert said in "".join(remarks(read(report(project))))


def test_findings_of_verify_stand_at_the_top(project: Project) -> None:
    flip(project.lora)
    assert project.run("verify").code == 4
    [said] = remarks(read(report(project)))
    assert str(project.lora) in said


def test_run_whose_store_is_elsewhere_says_so(project: Project) -> None:
    ran = command("report", "cat", "--runs", str(project.root / "runs"), "--store", str(project.root), "--json")
    assert "What train made is in none of the stores" in "".join(remarks(read(ran)))
    assert ran.counts["previews"] == 3


def test_unknown_run_names_the_nearest(project: Project) -> None:
    ran = command("report", "cta", "--runs", str(project.root / "runs"), "--json")
    assert (ran.code, ran.error) == (2, "run.unknown")
    assert "fix: did you mean cat?" in ran.stderr


def test_browser_is_opened_when_asked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", opened.append)
    report(project)
    assert opened == []
    report(project, "--open")
    assert opened == [(project.results / "report.html").as_uri()]


def test_grid_of_several_prompts_is_not_taken_for_a_preview(project: Project) -> None:
    (project.results / "preview.json").unlink()
    for number in (1, 2):
        Image.new("RGB", (32, 32)).save(project.results / f"preview_2_{number}.png")
    page = read(report(project))
    assert [each.text for each in page.all("figcaption", "prompt")] == ["prompt 1", "prompt 2"]
