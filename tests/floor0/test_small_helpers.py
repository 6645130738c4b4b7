from __future__ import annotations

import numpy as np
import pytest

from stfm import _lazy, _optional, _provenance
from stfm._errors import InputError, MissingDependencyError, MissingKeyError, WrongTypeError
from stfm._progress import progress
from stfm._validate import check_choice, check_count, check_positive, check_range, did_you_mean


def test_missing_key_error_reads_like_a_sentence():
    assert str(MissingKeyError("there is no 'x'")) == "there is no 'x'"


def test_require_says_how_to_install():
    with pytest.raises(MissingDependencyError, match=r"pip install 'stfm\[wsi\]'"):
        _optional.require("a_module_that_is_not_there", extra="wsi")


def test_require_tells_a_broken_package_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package_of_a_test.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="installed but cannot be imported"):
        _optional.require("broken_package_of_a_test", extra="encoders")


def test_require_returns_the_module():
    assert _optional.require("json", extra="wsi").dumps([1]) == "[1]"


@pytest.mark.parametrize(
    ("check", "args", "error", "words"),
    [
        (check_choice, ("mode", "al", ["all", "none"]), InputError, "Did you mean 'all'"),
        (check_choice, ("mode", "zzz", ["all", "none"]), InputError, "There are: 'all', 'none'"),
        (check_positive, ("size", 0), InputError, "greater than 0"),
        (check_positive, ("size", np.nan), InputError, "finite"),
        (check_positive, ("size", "1"), WrongTypeError, "must be a number"),
        (check_positive, ("size", True), WrongTypeError, "must be a number"),
        (check_count, ("k", 0), InputError, "at least 1"),
        (check_count, ("k", 2.0), WrongTypeError, "must be an integer"),
        (check_range, ("share", 1.5, 0, 1), InputError, "between 0 and 1"),
    ],
)
def test_checks_refuse_in_words(check, args, error, words):
    with pytest.raises(error, match=words):
        check(*args)


def test_checks_pass_good_values():
    assert check_choice("mode", "all", ["all"]) == "all"
    assert check_positive("size", np.float32(2)) is None
    assert check_count("k", np.int64(3)) is None


def test_did_you_mean_of_nothing():
    assert did_you_mean("x", []) == "There are none."


def test_a_record_is_plain_and_survives_h5ad(tmp_path):
    import anndata as ad

    params = {"a": None, "b": (1, 2), "c": ("x", 1), "d": np.float32(2), "e": {"f": tmp_path}, "g": [], "h": True}
    record = _provenance.record(params)
    adata = ad.AnnData(np.zeros((1, 1), np.float32), uns={"k": record})
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad").uns["k"]
    assert back["a"] == "none"
    assert back["b"].tolist() == [1, 2]
    assert back["c"].tolist() == ["x", "1"]
    assert back["e"]["f"] == str(tmp_path)
    assert back["stfm_version"] == record["stfm_version"]


def test_progress_is_silent_without_somebody_to_watch(capsys):
    with progress("work", 3) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


def test_lazy_names():
    get, listing, public = _lazy.attach("stfm", {"_keys": "", "StfmError": "_errors"})
    assert get("_keys").SPATIAL == "spatial"
    assert issubclass(get("StfmError"), Exception)
    assert listing() == public == ["StfmError", "_keys"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        get("nothing")
