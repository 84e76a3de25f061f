"""fetch against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from schemas.run import Model
from stages import cli
from stages.flux2.folder import open_model
from stages.flux2.micro import make_micro
from stages.hub import transfer
from tests.stages.hub import FIRST, LARGE_BYTES, MODEL, SECOND, Files, Hub, files_of, serving

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
SINGLE_FILE = "flux-2-klein-base-4b.safetensors"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("published") / "model"
    make_micro(folder)
    return {
        **files_of(folder),
        SINGLE_FILE: b"the same weights once more",
        "text_encoder/pytorch_model.bin": b"a pickle",
        "README.md": b"# words",
    }


@pytest.fixture
def hub(published: Files) -> Iterator[Hub]:
    with serving(dict(published)) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@dataclass(frozen=True)
class Done:
    """What one command came to."""

    returncode: int
    stdout: str
    stderr: str


class Fetch:
    """Runs the command in this process, with the hub's address and this machine's cache where the test has them."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str) -> Done:
        self._capfd.readouterr()
        code = cli.run(["fetch", *(arguments or (MODEL,))])
        out, err = self._capfd.readouterr()
        return Done(code, str(out), str(err))


@pytest.fixture
def fetch(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fetch:
    address(hub.server_port, monkeypatch)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    return Fetch(capfd)


def address(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which reads HF_ENDPOINT when it is imported, ask there."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


def process(hub: Hub, home: Path, *line: str, **more: str) -> subprocess.Popen[str]:
    """Start Python in a process of its own with the hub's address and the cache in its environment."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        **more,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *line], env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def the_object(done: Done) -> dict[str, Any]:
    assert done.stdout.count("\n") == 1, done.stderr
    return json.loads(done.stdout)


def repository(home: Path) -> Path:
    return home / "hub" / f"models--{MODEL.replace('/', '--')}"


def in_cache(home: Path, commit: str = FIRST) -> Files:
    return files_of(repository(home) / "snapshots" / commit)


def wanted(files: Files) -> Files:
    return {path: data for path, data in files.items() if "/" in path and not path.endswith(".bin")} | {
        "model_index.json": files["model_index.json"]
    }


def blob(home: Path, data: bytes, suffix: str = "") -> Path:
    return repository(home) / "blobs" / f"{hashlib.sha256(data).hexdigest()}{suffix}"


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


def test_cut_connection_goes_on_where_it_broke_off(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.cuts[TRANSFORMER] = [LARGE_BYTES, 1000]
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert [start for path, start in hub.asked if path == TRANSFORMER] == [0, LARGE_BYTES, LARGE_BYTES + 1000]
    assert in_cache(home) == wanted(published)


def test_fetch_that_gave_up_is_gone_on_with_by_the_next(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.cuts[TRANSFORMER] = [LARGE_BYTES, 0, 0, 0, 0]
    failed = fetch()
    assert failed.returncode == 7
    assert failed.stderr.splitlines()[-1].startswith("error[fetch.failed] cannot reach the hub")
    assert blob(home, published[TRANSFORMER], ".incomplete").read_bytes() == published[TRANSFORMER][:LARGE_BYTES]
    # No stage may take what is there for the model.
    assert not (repository(home) / "refs").exists()
    hub.asked.clear()
    assert fetch().returncode == 0
    assert [start for path, start in hub.asked if path == TRANSFORMER] == [LARGE_BYTES]
    assert in_cache(home) == wanted(published)


def test_interrupted_fetch_says_so_and_goes_on(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.cuts[TRANSFORMER] = [LARGE_BYTES, 0, 0, 0, 0]
    with process(hub, home, "-m", "stages", "fetch", MODEL) as other:
        deadline = time.monotonic() + 30
        # It waits between attempts: long enough to be interrupted with part of the file there.
        while (TRANSFORMER, LARGE_BYTES) not in hub.asked and time.monotonic() < deadline:
            time.sleep(0.02)
        other.send_signal(signal.SIGINT)
        _, said = other.communicate(timeout=30)
    assert other.returncode == 128 + signal.SIGINT
    assert "error[run.stopped] stopped; what came so far is kept. fix: give the same command again" in said
    hub.cuts.clear()
    hub.asked.clear()
    assert fetch().returncode == 0
    assert [start for path, start in hub.asked if path == TRANSFORMER] == [LARGE_BYTES]
    assert in_cache(home) == wanted(published)


def test_server_without_ranges_starts_the_file_anew(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.ranges = False
    hub.cuts[TRANSFORMER] = [LARGE_BYTES]
    assert fetch().returncode == 0
    assert in_cache(home) == wanted(published)


def test_file_that_another_program_left_half_is_gone_on_with_or_started_anew(
    fetch: Fetch, hub: Hub, home: Path, published: Files
) -> None:
    data = published[TRANSFORMER]
    for left in (data[:5000], b"?" * 5000, b"?" * (len(data) + 1)):
        part = blob(home, data, ".incomplete")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(left)
        (repository(home) / "snapshots" / FIRST / TRANSFORMER).unlink(missing_ok=True)
        blob(home, data).unlink(missing_ok=True)
        hub.asked.clear()
        assert fetch().returncode == 0
        assert in_cache(home) == wanted(published)
        starts = [start for path, start in hub.asked if path == TRANSFORMER]
        assert starts == {data[:5000]: [5000], b"?" * 5000: [5000, 0]}.get(left, [0])


@pytest.mark.parametrize("path", [TRANSFORMER, "model_index.json"])
def test_same_size_and_wrong_content_is_loaded_again(
    fetch: Fetch, hub: Hub, home: Path, published: Files, path: str
) -> None:
    fetch()
    place = (repository(home) / "snapshots" / FIRST / path).resolve()
    data = bytearray(published[path])
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    hub.asked.clear()
    done = fetch()
    assert done.returncode == 0
    assert f"warning: {path} is not what the hub publishes" in done.stderr
    assert hub.asked == [(path, 0)]
    assert in_cache(home) == wanted(published)


def test_server_that_sends_other_bytes_than_it_publishes_is_an_error(
    fetch: Fetch, hub: Hub, home: Path, published: Files
) -> None:
    hub.sends[TRANSFORMER] = bytes(len(published[TRANSFORMER]))
    done = fetch(MODEL, "--json")
    assert done.returncode == 4
    error = the_object(done)["error"]
    assert error["code"] == "fetch.digest"
    assert hashlib.sha256(published[TRANSFORMER]).hexdigest() in error["where"]
    assert not blob(home, published[TRANSFORMER]).exists()
    assert not blob(home, published[TRANSFORMER], ".incomplete").exists()


def test_branch_that_moves_meanwhile_gives_no_mixture(fetch: Fetch, hub: Hub, home: Path, published: Files) -> None:
    hub.commits[SECOND] = {path: data + b" " for path, data in published.items()}
    hub.after_listing = [("main", SECOND)]
    assert fetch().returncode == 0
    assert in_cache(home) == wanted(published)
    assert (repository(home) / "refs" / "main").read_text() == FIRST


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


def test_token_goes_to_the_hub_and_to_nobody_else(fetch: Fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.licensed = {"hf_good"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert fetch().returncode == 0
    assert (TRANSFORMER, None) in hub.tokens
    assert {token for _, token in hub.tokens} == {None}


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


def test_another_kind_of_model_is_refused_before_its_weights_are_loaded(fetch: Fetch, hub: Hub, home: Path) -> None:
    hub.commits[FIRST]["model_index.json"] = b'{"_class_name": "FluxPipeline"}'
    other = fetch()
    assert other.returncode == 7
    assert "error[fetch.layout] this repository is no FLUX.2 model" in other.stderr
    assert "FluxPipeline" in other.stderr
    assert TRANSFORMER not in hub.paths
    del hub.commits[FIRST]["model_index.json"]
    assert "it has no model_index.json" in fetch().stderr


def test_listing_that_leads_out_of_the_cache_is_refused(fetch: Fetch, hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.commits[FIRST]["transformer/../../../../../evil.safetensors"] = b"x" * LARGE_BYTES
    done = fetch()
    assert done.returncode == 4
    assert done.stderr.startswith("error[fetch.listing]")
    assert list(tmp_path.rglob("evil*")) == []


def test_disk_that_is_too_small_is_told_before_anything_is_loaded(
    fetch: Fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=5000))
    done = fetch()
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error[fetch.disk] the model does not fit on this disk")
    assert hub.asked == []


def test_file_system_without_links_holds_the_files_themselves(
    fetch: Fetch, hub: Hub, home: Path, published: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    for loaded in (sorted(wanted(published)), []):
        hub.asked.clear()
        assert fetch().returncode == 0
        assert hub.paths == loaded
        assert in_cache(home) == wanted(published)
    assert not any(path.is_symlink() for path in repository(home).rglob("*"))
