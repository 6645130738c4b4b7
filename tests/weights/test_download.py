"""Fetching from a real server on this machine: whole, cut, killed, refused, twice at once."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import stfm as sf
from stfm import _download
from stfm.errors import DataIntegrityError, InputError


def _files(folder: Path) -> list[str]:
    """Everything in a cache but its locks."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.parent.name != ".locks")


def _fetch(home, cache, sha256, **more):
    return _download.fetch_file(f"{home.url}/w.bin", cache / "weights" / "w.bin", sha256, **more)


def _ranges(home) -> list[str | None]:
    return [request.get("range") for request in home.gets]


def test_a_good_file_is_fetched_once(home, cache, sha256):
    path = _fetch(home, cache, sha256)
    assert path.read_bytes() == home.content
    assert _fetch(home, cache, sha256) == path
    assert _ranges(home) == [None]
    assert _files(cache) == ["w.bin"]


def test_a_wrong_file_is_refused_and_not_kept(home, cache, sha256):
    home.content = b"not it"
    with pytest.raises(DataIntegrityError, match=r"what http.*w\.bin gave is not the file that is meant"):
        _fetch(home, cache, sha256)
    assert _files(cache) == []


def test_a_cut_file_goes_on_by_itself(home, cache, sha256):
    home.cut_at = [100_000, 50_000]
    assert _fetch(home, cache, sha256).read_bytes() == home.content
    first, second, third = _ranges(home)
    assert first is None
    assert 90_000 < int(second[6:-1]) <= 100_000
    assert int(third[6:-1]) > int(second[6:-1])
    assert home.gets[1]["if-range"] == home.etag
    assert _files(cache) == ["w.bin"]


def test_a_file_that_stays_cut_is_told_and_goes_on_next_time(home, cache, sha256, monkeypatch):
    monkeypatch.setattr(_download, "RETRIES", 0)
    home.cut_at = [100_000]
    with pytest.raises(InputError, match="could not fetch .*put the file at"):
        _fetch(home, cache, sha256)
    assert not (cache / "weights" / "w.bin").exists()
    assert _files(cache) == ["part", "tag"]
    assert _fetch(home, cache, sha256).read_bytes() == home.content
    assert int(_ranges(home)[1][6:-1]) > 90_000
    assert _files(cache) == ["w.bin"]


@pytest.mark.parametrize("behaviour", [{"ranges": False}, {"wrong_range": True}, {"etag": ""}])
def test_servers_that_know_no_ranges(behaviour, home, cache, sha256):
    for name, value in behaviour.items():
        setattr(home, name, value)
    home.cut_at = [100_000]
    assert _fetch(home, cache, sha256).read_bytes() == home.content


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(home, cache, sha256, monkeypatch):
    monkeypatch.setattr(_download, "RETRIES", 0)
    good, home.content, home.cut_at = home.content, bytes(200_000), [100_000]
    with pytest.raises(InputError):
        _fetch(home, cache, sha256)
    home.content, home.etag = good, '"two"'
    assert _fetch(home, cache, sha256).read_bytes() == good


def test_parts_that_do_not_fit_together_are_fetched_from_their_start(home, cache, sha256, monkeypatch):
    monkeypatch.setattr(_download, "RETRIES", 0)
    good, home.content, home.cut_at = home.content, bytes(200_000), [100_000]
    with pytest.raises(InputError):
        _fetch(home, cache, sha256)
    home.content = good  # under the same tag
    assert _fetch(home, cache, sha256).read_bytes() == good
    assert _ranges(home)[2] is None


def test_a_part_that_is_whole_already_is_not_fetched_again(home, cache, sha256):
    work = cache / "weights" / ".w.bin.fetch"
    work.mkdir(parents=True)
    (work / "part").write_bytes(home.content)
    assert _fetch(home, cache, sha256).read_bytes() == home.content
    (work).mkdir()
    (work / "part").write_bytes(home.content + b"too much")
    (cache / "weights" / "w.bin").unlink()
    assert _fetch(home, cache, sha256).read_bytes() == home.content


@pytest.mark.parametrize("status", [404, 403, 401])
def test_refusals_are_told_at_once(status, home, cache, sha256):
    home.status = status
    with pytest.raises(InputError, match=f"could not fetch .*{status}"):
        _fetch(home, cache, sha256)
    assert len(home.gets) == 1
    assert _files(cache) == []


@pytest.mark.parametrize("status", [403, 401])
def test_terms_are_named_with_their_page(status, home, cache, sha256):
    home.status = status
    with pytest.raises(InputError, match=r"terms .*accept them at https://publisher/page.*STFM_WEIGHTS"):
        _fetch(home, cache, sha256, page="https://publisher/page")


def test_a_server_that_is_busy_is_asked_again(home, cache, sha256, monkeypatch):
    home.status = 503
    waits = []

    def free(seconds: float) -> None:
        waits.append(seconds)
        home.status = 200 if len(waits) == 2 else 503

    monkeypatch.setattr(_download.time, "sleep", free)
    assert _fetch(home, cache, sha256).read_bytes() == home.content
    assert waits[1] == 2 * waits[0]


@pytest.mark.parametrize("url", ["127.0.0.1:9/w.bin", "htp://127.0.0.1/w.bin", "hub:o/r/w.bin"])
def test_a_malformed_address_is_no_wrong_file(url, cache, sha256):
    with pytest.raises(InputError, match=f"could not fetch {url} .*check the network, set STFM_MIRROR"):
        _download.fetch_file(url, cache / "w.bin", sha256)


def test_a_dead_port_is_told_at_once(cache, sha256):
    start = time.monotonic()
    with pytest.raises(InputError, match="could not fetch http://127.0.0.1:1/w.*check the network.*put the file at"):
        _download.fetch_file("http://127.0.0.1:1/w", cache / "w", sha256)
    assert time.monotonic() - start < 2


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(home, cache, sha256, monkeypatch):
    monkeypatch.setattr(_download, "TIMEOUT", (0.2, 0.2))
    home.hang_at = [0]
    with pytest.raises(InputError, match="could not fetch .*timed out"):
        _fetch(home, cache, sha256)


def test_a_stalled_transfer_goes_on(home, cache, sha256, monkeypatch):
    monkeypatch.setattr(_download, "TIMEOUT", (0.2, 0.2))
    home.hang_at = [100_000]
    assert _fetch(home, cache, sha256).read_bytes() == home.content
    assert len(home.gets) == 2
    assert int(_ranges(home)[1][6:-1]) > 90_000


def test_progress_counts_the_bytes(home, cache, sha256, monkeypatch):
    bars = []

    @contextmanager
    def bar(description, total, *, unit):
        steps = []
        bars.append((description, total, unit, steps))
        yield steps.append

    monkeypatch.setattr(_download, "progress", bar)
    home.cut_at = [100_000]
    _fetch(home, cache, sha256)
    assert [(name, total, unit) for name, total, unit, _ in bars] == [("w.bin", len(home.content), "bytes")] * 2
    assert 0 < sum(bars[0][3]) <= 100_000
    assert bars[1][3][0] == sum(bars[0][3])  # goes on where it was
    assert sum(bars[1][3]) == len(home.content)


def _wait_for(size: int, part: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 15
    while not (part.is_file() and part.stat().st_size >= size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def test_a_killed_fetch_goes_on(home, cache, sha256, script):
    home.hang_at = [100_000]
    url = f"{home.url}/w.bin"
    process = subprocess.Popen([sys.executable, "-c", script(url, sha256, cache)], stderr=subprocess.PIPE)
    target = cache / "weights" / "url" / home.url.removeprefix("http://").replace(":", "_") / "w.bin"
    _wait_for(50_000, target.with_name(".w.bin.fetch") / "part", process)
    process.kill()
    process.communicate()
    assert not target.exists()
    home.go_on.set()
    assert sf.weights.locate(url, sha256=sha256) == target
    assert target.read_bytes() == home.content
    assert int(_ranges(home)[1][6:-1]) >= 50_000
    assert _files(cache) == ["w.bin"], "what the killed process left is gone"


def test_two_processes_fetch_once_and_both_have_it(home, cache, sha256, script):
    home.hang_at = [100_000]
    code = script(f"{home.url}/w.bin", sha256, cache)
    pair = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    part = cache / "weights" / "url" / home.url.removeprefix("http://").replace(":", "_") / ".w.bin.fetch" / "part"
    _wait_for(50_000, part, pair[0])
    time.sleep(0.5)  # the other one stands before the lock by now
    home.go_on.set()
    said = [process.communicate(timeout=20) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert Path(said[0][0]).read_bytes() == home.content
    assert len(home.gets) == 1


def test_a_cache_that_can_only_be_read(home, cache, sha256, monkeypatch):
    path = _fetch(home, cache, sha256)

    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert _fetch(home, cache, sha256) == path  # what is there is used
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\); set STFM_CACHE.*STFM_WEIGHTS"):
        _download.fetch_file(f"{home.url}/x.bin", cache / "weights" / "x.bin", sha256)


def test_a_cache_that_cannot_be_made(home, tmp_path, sha256):
    (tmp_path / "file").write_text("")
    with (
        sf.settings.override(cache_dir=tmp_path / "file" / "cache", offline=False),
        pytest.raises(InputError, match="cannot be written"),
    ):
        sf.weights.locate(f"{home.url}/w.bin", sha256=sha256)


def test_a_full_disk_is_told(home, cache, sha256, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_download.ResumingDownloader, "_write", full)
    with pytest.raises(InputError, match="No space left on device"):
        _fetch(home, cache, sha256)


def test_offline_nothing_is_asked(home, cache, sha256):
    with sf.settings.override(offline=True):
        with pytest.raises(InputError, match=r"not in the cache and STFM_OFFLINE is set.*http://"):
            _fetch(home, cache, sha256)
        (cache / "weights").mkdir(parents=True)
        (cache / "weights" / "w.bin").write_bytes(b"half")
        with pytest.raises(DataIntegrityError, match="is damaged .*delete it"):
            _fetch(home, cache, sha256)
    assert home.asked == []


def test_without_a_hash_the_first_file_is_the_one(home, cache):
    path = _fetch(home, cache, None)
    assert path.read_bytes() == home.content
    path.write_bytes(b"damaged")
    home.content = b"another release"
    with pytest.raises(DataIntegrityError, match="not the file that is meant"):
        _fetch(home, cache, None)
    path.unlink()  # said by hand: another one is wanted
    assert _fetch(home, cache, None).read_bytes() == b"another release"


def test_without_a_hash_only_what_the_server_confirms_is_resumed(home, cache):
    home.etag, home.cut_at = "", [100_000]
    assert _fetch(home, cache, None).read_bytes() == home.content
    assert _ranges(home) == [None, None]


def test_a_hash_is_computed_once_for_a_file_that_stays(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"1")
    expected = hashlib.sha256(b"1").hexdigest()
    assert _download.sha256_of(tmp_path / "f") == expected
    monkeypatch.setattr(Path, "open", None)
    assert _download.sha256_of(tmp_path / "f") == expected
    monkeypatch.undo()
    (tmp_path / "f").write_bytes(b"22")
    assert _download.sha256_of(tmp_path / "f") == hashlib.sha256(b"22").hexdigest()
