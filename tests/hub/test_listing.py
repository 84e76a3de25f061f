"""What the hub lists and refuses, told in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.home import TRANSFORMER, Fetch, address, in_cache, repository, wanted
from tests.hub.server import FIRST, LARGE_BYTES, MODEL, SECOND, Files, Hub


def test_branch_that_moves_meanwhile_gives_no_mixture(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.commits[SECOND] = {path: data + b" " for path, data in published.items()}
    hub.after_listing = [("main", SECOND)]
    assert fetch().returncode == 0
    assert in_cache(home) == wanted(published)
    assert (repository(home) / "refs" / "main").read_text() == FIRST


def test_gated_model_says_what_to_accept_where_and_never_the_token(
    fetch: Fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.licensed = {"hf_good"}
    nobody = fetch()
    assert nobody.returncode == 7
    assert nobody.stderr.splitlines()[-1].startswith("error[fetch.gated] the model's licence must be accepted first")
    assert f"accept it on https://huggingface.co/{MODEL}, log in with `hf auth login`" in nobody.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    stranger = fetch()
    assert stranger.returncode == 7
    assert "the account of your token has not" in stranger.stderr
    assert "hf_stranger" not in stranger.stderr + stranger.stdout
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert fetch().returncode == 0


def test_file_that_is_listed_and_not_there_is_named(fetch: Fetch, hub: Hub, home: Path) -> None:
    hub.lacks.add(TRANSFORMER)
    done = fetch()
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error[fetch.missing] the hub lacks a file that it lists")
    assert TRANSFORMER in done.stderr


def test_unknown_model_and_absent_hub_are_errors_with_a_remedy(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = fetch("someone/nothing")
    assert unknown.returncode == 7
    assert unknown.stderr.startswith("error[fetch.unknown]")
    for name, words in (("klien-4b", "no such model"), ("flux2-micro", "built in")):
        misspelt = fetch(name)
        assert misspelt.returncode == 2
        assert words in misspelt.stderr
        assert "klein-base-4b" in misspelt.stderr
    address(9, monkeypatch)  # nobody answers there
    absent = fetch()
    assert absent.returncode == 7
    assert absent.stderr.startswith("error[fetch.failed] cannot reach the hub")
    assert "fix: run it again" in absent.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = fetch()
    assert (offline.returncode, offline.stderr[:20]) == (7, "error[fetch.offline]")


def test_listing_that_leads_out_of_the_cache_is_refused(fetch: Fetch, hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.commits[FIRST]["transformer/../../../../../evil.safetensors"] = b"x" * LARGE_BYTES
    done = fetch()
    assert done.returncode == 4
    assert done.stderr.startswith("error[fetch.listing]")
    assert list(tmp_path.rglob("evil*")) == []


def test_token_that_the_hub_does_not_know_is_told_from_a_licence(fetch: Fetch, hub: Hub) -> None:
    hub.refusals = [(401, "Invalid credentials in Authorization header")]
    done = fetch()
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error[fetch.token] the hub does not accept your token")


def test_server_in_trouble_is_asked_again_and_given_up(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.refusals = [(503, ""), (429, ""), (502, "")]
    assert fetch().returncode == 0
    assert in_cache(home) == wanted(published)
    shutil.rmtree(home)
    hub.refusals = [(503, "")] * 4
    done = fetch()
    assert done.returncode == 7
    assert "error[fetch.failed] the hub cannot answer" in done.stderr
    assert "HTTP 503" in done.stderr


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>Log in to this network</html>",
        b"[1]",
        json.dumps({"id": MODEL, "sha": FIRST, "siblings": [{"rfilename": "model_index.json"}]}).encode(),
        json.dumps({"id": MODEL, "sha": "main", "siblings": []}).encode(),
    ],
    ids=["a page", "no table", "no digests", "no commit"],
)
def test_list_that_is_none_or_cannot_be_checked_by_is_refused(fetch: Fetch, hub: Hub, listing: bytes) -> None:
    hub.listing = listing
    done = fetch()
    assert done.returncode == 4
    assert done.stderr.startswith("error[fetch.listing]")
    assert hub.asked == []
