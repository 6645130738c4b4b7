"""``stfm weights`` and what ``stfm doctor`` says of weights."""

from __future__ import annotations

import hashlib
import tomllib

import pytest
from typer.testing import CliRunner

import stfm as sf
from stfm.cli import _doctor, app
from stfm.errors import InputError, MissingKeyError

runner = CliRunner()


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def name(row, home, cache, sha256):
    row("remote", kind="encoder", urls=(home.url,), files={"w.bin": sha256}, licence="MIT", size=len(home.content))
    return "remote"


def _run(*words: str, status: int = 0) -> str:
    result = runner.invoke(app, ["weights", *words])
    assert result.exit_code == status, result.output
    return result.output


def test_fetch_then_path_then_list(name, cache):
    target = str(cache / "weights" / "remote" / "w.bin")
    (before,) = [line for line in _run("list").splitlines() if "│ remote" in line]
    assert " no " in before
    assert "0.2 MiB" in before
    assert _run("fetch", name).strip() == target
    assert _run("path", name).strip() == target
    (after,) = [line for line in _run("list").splitlines() if "│ remote" in line]
    assert " yes " in after


def test_the_list_is_read_in_a_narrow_window(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = _run("list").splitlines()
    assert "remote: a test" in lines
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == len(sf.weights.list_weights())  # a line each
    assert max(map(len, rows)) <= 80


def test_verify_ends_with_1_where_something_is_damaged_or_what_was_named_is_absent(name):
    assert "absent" in _run("verify", name, status=1)
    assert "absent" in _run("verify")  # of all weights some may be absent
    path = sf.weights.fetch(name)
    assert "ok" in _run("verify", name)
    path.write_bytes(b"damaged")
    assert "damaged" in _run("verify", name, status=1)
    assert "damaged" in _run("verify", status=1)


def test_errors_are_those_of_the_library(name):
    result = runner.invoke(app, ["weights", "path", name])
    assert isinstance(result.exception, InputError)
    result = runner.invoke(app, ["weights", "fetch", "defualt"])
    assert isinstance(result.exception, MissingKeyError)


def test_hash_prints_what_the_table_reads(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("1")
    (tmp_path / "mine" / "b.txt").write_text("22")
    table = tomllib.loads(_run("hash", str(tmp_path / "mine")))
    expected = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in (("a.txt", "1"), ("b.txt", "22"))}
    assert table == {"size": 3, "mine": {"files": expected}}
    assert tomllib.loads(_run("hash", str(tmp_path / "mine" / "a.txt")))["a"]["files"] == {"a.txt": expected["a.txt"]}
    result = runner.invoke(app, ["weights", "hash", str(tmp_path / "absent")])
    assert isinstance(result.exception, MissingKeyError)


def test_doctor_says_that_a_folder_of_weights_is_not_there(tmp_path):
    with sf.settings.override(weights_dir=tmp_path / "absent"):
        (found,) = [row for row in _doctor.examine() if row.name == "folder of weights"]
    assert (found.state, found.value) == ("note", f"{tmp_path / 'absent'} (no such folder)")


def test_doctor_says_which_weights_are_here(name, cache):
    def found() -> _doctor.Finding:
        return next(row for row in _doctor._weights() if row.name == name)

    assert (found().state, found().advice) == ("note", "stfm weights fetch remote")
    sf.weights.fetch(name)
    assert found().state == "ok"
    assert found().value == f"remote@1 in {cache / 'weights' / 'remote' / 'w.bin'}"
