"""Weights files are opened without running what is in them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import stfm as sf
from stfm.errors import DataIntegrityError, InputError, MissingKeyError
from stfm.weights.state import check_finite

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def _equal(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "saved",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": {f"module.{name}": tensor for name, tensor in STATE.items()}, "optimizer": {"lr": 0.1}},
        {"teacher": {f"backbone.{name}": tensor for name, tensor in STATE.items()}, "student": {}},
    ],
    ids=["plain", "lightning", "data parallel", "teacher"],
)
def test_wrappers_of_training_code_come_off(saved, tmp_path):
    torch.save(saved, tmp_path / "w.pt")
    assert _equal(sf.weights.read_state(tmp_path / "w.pt"))


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    assert _equal(sf.weights.read_state(str(tmp_path / "w.safetensors")))
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-3])
    with pytest.raises(DataIntegrityError, match="not a readable safetensors file"):
        sf.weights.read_state(tmp_path / "w.safetensors")


def test_a_folder_is_no_file_of_weights(tmp_path):
    (tmp_path / "w.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder; give the file"):
        sf.weights.read_state(tmp_path / "w.safetensors")
    with pytest.raises(MissingKeyError, match="no weights file"):
        sf.weights.read_state(tmp_path / "absent.safetensors")


class _Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def _malicious(mark: Path) -> dict:
    return {"a.weight": STATE["a.weight"], "a.bias": _Evil(mark)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(zipped, tmp_path):
    mark, file = tmp_path / "was-run", tmp_path / "w.bin"
    torch.save(_malicious(mark), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataIntegrityError, match="cannot be opened safely.*safetensors"):
        sf.weights.read_state(file)
    assert not mark.exists()
    torch.load(file, weights_only=False)  # it does run where it is let
    assert mark.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    mark, file = tmp_path / "was-run", tmp_path / "w.pkl"
    file.write_bytes(pickle.dumps(_malicious(mark)))
    with pytest.raises(DataIntegrityError, match="cannot be opened safely"):
        sf.weights.read_state(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("saved", "match"),
    [([1, 2], "no named tensors .list"), ({}, "no named tensors"), ({"a": 3, "b": STATE["a.bias"]}, "no tensor .a.")],
)
def test_what_is_no_state_dict_is_refused(saved, match, tmp_path):
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(DataIntegrityError, match=match):
        sf.weights.read_state(tmp_path / "w.pt")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(MissingKeyError, match="There is no weights file"):
        sf.weights.read_state(tmp_path / "w.pt")
    for content in (b"", b"<html>log in first</html>", b"\x80\x04garbage", b"PK\x03\x04cut"):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(DataIntegrityError, match="cannot be opened safely"):
            sf.weights.read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_is_told_wherever_it_is_damaged(zipped, tmp_path):
    file = tmp_path / "w.pt"
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for at in generator.integers(0, len(whole), size=generator.integers(1, 30)):
            content[at] = generator.integers(0, 256)
        file.write_bytes(content)
        try:
            sf.weights.read_state(file)
        except DataIntegrityError as error:
            assert str(file) in str(error)  # noqa: PT017


def test_weights_that_are_not_finite_are_told():
    big = {"a": torch.full((4,), 3e38), "b": torch.full((9,), 6e4, dtype=torch.float16), "n": torch.arange(3)}
    check_finite({**big, "meta": torch.empty(2, device="meta"), "none": torch.zeros(0)}, "w.pt")
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(DataIntegrityError, match="w.pt holds weights that are NaN or infinite, 'c' first"):
            check_finite({**big, "c": torch.tensor([0.0, value]), "d": torch.tensor(value)}, "w.pt")
    with pytest.raises(DataIntegrityError, match="'e' first"):  # which cancel out
        check_finite({"e": torch.tensor([float("inf"), -float("inf")], dtype=torch.bfloat16)}, "w.pt")


def test_the_room_loads_no_torch():
    code = (
        "import sys, stfm; stfm.weights.list_weights(); sys.exit('torch' in sys.modules or 'requests' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
