"""The fetch command against a server on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from schemas.run import Model
from stages.fetch import hub_id
from stages.flux2.folder import open_model
from stages.flux2.variants import VARIANTS, Variant
from stages.hub.cache import HUB_ID
from tests.hub.home import TRANSFORMER, Fetch, in_cache, process, repository, the_object, wanted
from tests.hub.server import FIRST, MODEL, SECOND, Files, Hub


def test_a_model_by_its_short_name_lands_in_the_cache_and_opens(
    fetch: Fetch, hub: Hub, home: Path, published: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = fetch("klein-base-4b", "--json")
    assert done.returncode == 0, done.stderr
    result = the_object(done)
    assert (result["status"], result["key"]) == ("built", FIRST)
    assert result["path"] == str(repository(home) / "snapshots" / FIRST)
    assert result["counts"] == {"files": len(wanted(published)), "loaded": len(wanted(published)), "reused": 0}
    assert "fetch 100%" in done.stderr
    assert "check" not in done.stderr
    monkeypatch.setenv("HF_HOME", str(home))
    model = open_model(Model(source=MODEL), home, lambda name: home / name)
    assert model.transformer[0].read_bytes() == published[TRANSFORMER]
    assert model.commit == FIRST


def test_only_what_the_stages_read_is_downloaded_and_only_once(
    fetch: Fetch, hub: Hub, home: Path, published: Files
) -> None:
    assert fetch().returncode == 0
    assert hub.paths == sorted(wanted(published))
    assert in_cache(home) == wanted(published)
    hub.asked.clear()
    again = fetch(MODEL, "--json")
    assert (again.returncode, hub.asked) == (0, [])
    assert the_object(again)["status"] == "up to date"
    assert the_object(again)["counts"]["reused"] == len(wanted(published))


def test_huggingface_hub_finds_what_was_fetched_without_asking_for_it(
    fetch: Fetch, hub: Hub, home: Path, published: Files
) -> None:
    fetch()
    script = f"""
from huggingface_hub import hf_hub_download, scan_cache_dir
print(hf_hub_download({MODEL!r}, {TRANSFORMER!r}, local_files_only=True))
report = scan_cache_dir()
print(len(report.warnings), [len(each.revisions) for each in report.repos])
"""
    with process(hub, home, "-c", script, HF_HUB_OFFLINE="1") as other:
        path, rest = other.communicate(timeout=60)[0].splitlines()
    assert Path(path).read_bytes() == published[TRANSFORMER]
    assert rest == "0 [1]"


def test_branch_that_moved_is_told_and_the_old_commit_stays(
    fetch: Fetch, hub: Hub, home: Path, published: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch()
    changed = {**published, TRANSFORMER: published[TRANSFORMER][::-1]}
    hub.commits[SECOND], hub.refs["main"] = changed, SECOND
    hub.asked.clear()
    done = fetch()
    assert f"warning: main of {MODEL} was {FIRST} and is {SECOND} now" in done.stderr
    assert f'model.revision = "{FIRST}"' in done.stderr
    # What both commits have is not loaded twice.
    assert hub.asked == [(TRANSFORMER, 0)]
    monkeypatch.setenv("HF_HOME", str(home))
    for revision, files in (("main", changed), (FIRST, published), (SECOND, changed)):
        model = open_model(Model(source=MODEL, revision=revision), home, lambda name: home / name)
        assert model.transformer[0].read_bytes() == files[TRANSFORMER]


def test_tag_and_commit_are_fetched_by_name(
    fetch: Fetch, hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refs["v1.0"] = FIRST
    assert fetch(MODEL, "--revision", "v1.0").returncode == 0
    assert fetch(MODEL, "--revision", FIRST).returncode == 0
    assert [path.name for path in (repository(home) / "refs").iterdir()] == ["v1.0"]
    monkeypatch.setenv("HF_HOME", str(home))
    assert open_model(Model(source=MODEL, revision="v1.0"), home, lambda name: home / name).commit == FIRST
    absent = fetch(MODEL, "--revision", "v2.0")
    assert absent.returncode == 7
    assert absent.stderr.startswith("error[fetch.revision] the model has no such revision")
    assert fetch(MODEL, "--revision", "../../x").returncode == 2


def test_another_kind_of_model_is_refused_before_its_weights_are_loaded(fetch: Fetch, hub: Hub, home: Path) -> None:
    hub.commits[FIRST]["model_index.json"] = b'{"_class_name": "FluxPipeline"}'
    other = fetch()
    assert other.returncode == 7
    assert "error[fetch.layout] this repository is no FLUX.2 model" in other.stderr
    assert "FluxPipeline" in other.stderr
    assert TRANSFORMER not in hub.paths
    del hub.commits[FIRST]["model_index.json"]
    assert "it has no model_index.json" in fetch().stderr


def test_second_fetch_at_the_same_time_waits_and_loads_nothing_twice(hub: Hub, home: Path, published: Files) -> None:
    line = ("-m", "stages", "fetch", MODEL, "--json")
    with process(hub, home, *line) as first, process(hub, home, *line) as second:
        printed = [json.loads(each.communicate(timeout=60)[0]) for each in (first, second)]
    assert sorted(each["status"] for each in printed) == ["built", "up to date"]
    assert sorted(path for path, _ in hub.asked) == sorted(wanted(published))


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, row in VARIANTS.items() if row.hub_id])
def test_every_published_model_has_a_short_name(name: str, row: Variant) -> None:
    assert hub_id(name) == hub_id(row.hub_id or "") == row.hub_id
    assert HUB_ID.fullmatch(row.hub_id or "")


def test_disk_that_is_too_small_is_told_before_anything_is_loaded(
    fetch: Fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=5000))
    done = fetch()
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error[fetch.disk] the model does not fit on this disk")
    assert hub.asked == []
