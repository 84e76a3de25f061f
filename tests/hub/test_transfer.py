"""Bytes from a server on this machine: cut, wrong, damaged, interrupted."""

from __future__ import annotations

import errno
import hashlib
import signal
import time
from pathlib import Path

import pytest

from tests.hub.home import TRANSFORMER, Fetch, blob, in_cache, process, repository, the_object, wanted
from tests.hub.server import FIRST, LARGE_BYTES, MODEL, Files, Hub


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


def test_token_goes_to_the_hub_and_to_nobody_else(fetch: Fetch, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.licensed = {"hf_good"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert fetch().returncode == 0
    assert (TRANSFORMER, None) in hub.tokens
    assert {token for _, token in hub.tokens} == {None}


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
