"""The command line: help, doctor, inputs, and errors in one line."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import stfm
from stfm.__main__ import main
from stfm.cli import _doctor, _inputs, app
from stfm.errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning

runner = CliRunner()
ROOT = Path(__file__).resolve().parents[1]


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"stfm {stfm.__version__}"


@pytest.mark.parametrize("command", ["demo", "doctor", "train", "embed", "predict", "weights"])
def test_every_command_has_help(command: str):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_doctor_table_leaves_brackets_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_doctor, "_is_there", lambda module: module not in {"timm", "peft"})
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "pip install 'stfm[encoders]'" in result.stdout
    assert stfm.__version__ in result.stdout


def test_doctor_json_reports_every_part():
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    assert {row["part"] for row in findings} == {
        "versions",
        "device",
        "threads",
        "cache",
        "network",
        "extras",
        "weights",
    }
    assert {row["state"] for row in findings} <= set(_doctor.STATES)
    assert all(row["advice"] for row in findings if row["state"] != "ok")


def test_doctor_sees_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_doctor, "_is_writable", lambda _folder: False)
    with stfm.settings.override(cache_dir=tmp_path / "cache", offline=True, mirror="https://mirror.example"):
        rows = {(row.part, row.name): row for row in _doctor.examine()}
    assert rows["cache", "writable"].state == "missing"
    assert "STFM_CACHE" in rows["cache", "writable"].advice
    assert rows["network", "offline"].state == "note"
    assert rows["network", "mirror"].value == "https://mirror.example"
    assert not (tmp_path / "cache").exists()


def test_doctor_lists_cached_weights(tmp_path: Path):
    (tmp_path / "weights" / "a").mkdir(parents=True)
    (tmp_path / "weights" / "a" / "model.safetensors").write_bytes(b"")
    with stfm.settings.override(cache_dir=tmp_path):
        rows = [row for row in _doctor.examine() if row.part == "weights"]
    assert [row.name for row in rows] == [*stfm.weights.list_weights().index, "a/model.safetensors"]
    assert all(row.advice for row in rows if row.state != "ok")


def test_wrong_slide_names():
    with pytest.raises(InputError, match="There is no file no-such.h5ad"):
        _inputs.open_slide("no-such.h5ad")
    with pytest.raises(MissingKeyError, match="her2st:C2"):
        _inputs.open_slide("her2st:C22")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.png", r"t\.png is no \.h5ad file\. .*a picture has no counts; it is given with --image"),
        ("README.md", r"README\.md is no \.h5ad file\. A slide is an \.h5ad file or a data set such as toy"),
        ("absent.csv", r"absent\.csv is neither there nor an \.h5ad file"),
        ("folder", r"folder is a folder\."),
        ("some/where", r"some/where is neither there"),
    ],
)
def test_files_that_are_no_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str):
    monkeypatch.chdir(tmp_path)
    for there in ("t.png", "README.md"):
        (tmp_path / there).write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        _inputs.open_slide(name)


def test_damaged_slides(tmp_path: Path):
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with pytest.raises(DataIntegrityError, match=r"text\.h5ad is not an \.h5ad file"):
        _inputs.open_slide(str(tmp_path / "text.h5ad"))
    stfm.datasets.toy(n_spots=20, image=False).write_h5ad(tmp_path / "whole.h5ad")
    whole = (tmp_path / "whole.h5ad").read_bytes()
    (tmp_path / "short.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataIntegrityError, match=r"short\.h5ad cannot be read as \.h5ad"):
        _inputs.open_slide(str(tmp_path / "short.h5ad"))


def test_wrong_output_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(InputError, match=r"must name a \.h5ad file"):
        _inputs.check_output(tmp_path / "result.csv", suffix=".h5ad")
    (tmp_path / "a.h5ad").mkdir()
    with pytest.raises(InputError, match="is a folder; name the"):
        _inputs.check_output(tmp_path / "a.h5ad", suffix=".h5ad")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; name a folder"):
        _inputs.check_folder(tmp_path / "file")
    for check in (lambda: _inputs.check_folder(tmp_path / "file" / "b"), lambda: _output(tmp_path / "file" / "b.h5ad")):
        with pytest.raises(InputError, match=r"cannot be written: .*file is a file"):
            check()
    assert _output(tmp_path / "new" / "b.h5ad") == tmp_path / "new" / "b.h5ad"
    assert not (tmp_path / "new").exists()  # made when there is something to write


def _output(path: Path) -> Path:
    return _inputs.check_output(path, suffix=".h5ad")


def test_output_in_a_folder_that_was_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stfm.tl.embed", lambda *_args, **_options: None)
    slide, out = tmp_path / "s.h5ad", tmp_path / "new" / "sub" / "o.h5ad"
    stfm.datasets.toy(n_spots=20, image=False).write_h5ad(slide)
    result = runner.invoke(app, ["embed", str(slide), "--model", "m", "--out", str(out)])
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [f"made the folder {out.parent}", f"saved {out}"]
    assert out.is_file()


def test_an_error_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["stfm", "embed", "no-such.h5ad", "--model", "m", "--out", "out.h5ad"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.strip() == "stfm: There is no file no-such.h5ad; check the path."


def test_a_warning_is_one_line_and_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def command() -> None:
        for number in range(2):
            warnings.warn("spots lie on top of each other", StfmWarning, stacklevel=1 + number)

    monkeypatch.setattr("stfm.cli.app", command)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err.splitlines() == ["stfm: warning: spots lie on top of each other"]


def test_ci_and_readme_agree():
    """``.ci/run`` takes its commands from README.md: every marker that it asks for is there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("install", "demo", "test"):
        assert f"from_readme {name}" in script
        line = readme.index(f"<!-- ci:{name} -->")
        assert readme[line + 1] == "```bash"
