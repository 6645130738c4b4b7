from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

import stfm as sf
from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm.models.base import CONFIG_FILE, WEIGHTS_FILE
from stfm.slide.genes import Vocabulary

GENES = Vocabulary(np.array([f"GENE{i}" for i in range(40)]))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = sf.models.create("st-align-tiny", GENES)
    model.seen.slides.append("C1")
    model.seen.patients.append("C")
    model.history = pd.DataFrame({"epoch": [0, 1], "loss": [2.0, 1.5]})
    return model, model.save(tmp_path / "model")


def test_a_model_comes_back_bit_for_bit(saved):
    model, folder = saved
    back = sf.models.load(folder)
    assert back.weights_sha256() == model.weights_sha256()
    assert back.config == model.config
    assert back.vocabulary == model.vocabulary
    assert back.seen == model.seen
    assert not back.training
    pd.testing.assert_frame_equal(back.history, model.history)


def test_the_card_says_what_the_model_saw(saved):
    _, folder = saved
    card = (folder / "README.md").read_text()
    assert "patients: C" in card
    assert "loss 1.5" in card


def test_the_hash_follows_the_weights(saved):
    model, _ = saved
    before = model.weights_sha256()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1e-3)
    assert model.weights_sha256() != before


def test_a_checkpoint_of_another_architecture_is_refused(saved, tmp_path):
    _, folder = saved
    other = sf.models.create("st-align-tiny", GENES, width=32).save(tmp_path / "other")
    (other / WEIGHTS_FILE).replace(folder / WEIGHTS_FILE)
    with pytest.raises(DataIntegrityError, match="another architecture"):
        sf.models.load(folder)


def test_a_cut_file_is_refused(saved):
    _, folder = saved
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataIntegrityError, match="no whole safetensors file"):
        sf.models.load(folder)


def test_weights_that_are_not_finite_are_refused(saved):
    model, folder = saved
    name, tensor = next((n, p) for n, p in model.named_parameters() if p.ndim == 1)
    with torch.no_grad():
        tensor[-1] = float("nan")
    model.save(folder)
    with pytest.raises(DataIntegrityError, match=f"{WEIGHTS_FILE} holds .* NaN or infinite, '{name}' first"):
        sf.models.load(folder)


def test_what_is_no_model_is_refused(saved, tmp_path):
    _, folder = saved
    with pytest.raises(MissingKeyError, match="no saved model"):
        sf.models.load(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(MissingKeyError, match="does not exist"):
        sf.models.load(folder)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(DataIntegrityError, match="not valid JSON"):
        sf.models.load(folder)
    (folder / CONFIG_FILE).write_text("{}")
    with pytest.raises(DataIntegrityError, match="lacks 'config'"):
        sf.models.load(folder)


def test_a_family_is_told_from_another(saved):
    from stfm.models.contrastive import Contrastive

    _, folder = saved
    with pytest.raises(DataIntegrityError, match="'st-align' model"):
        Contrastive.load(folder)
    description = json.loads((folder / CONFIG_FILE).read_text())
    description["family"] = "st-alien"
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    with pytest.raises(MissingKeyError, match="st-align"):
        sf.models.load(folder)


def test_unknown_fields_are_refused(saved):
    _, folder = saved
    description = json.loads((folder / CONFIG_FILE).read_text())
    description["config"]["colour"] = "red"
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    with pytest.raises(InputError, match="no field 'colour'"):
        sf.models.load(folder)
    with pytest.raises(InputError, match="Did you mean 'width'"):
        sf.models.create("st-align-tiny", GENES, widht=3)
    with pytest.raises(MissingKeyError, match="Did you mean"):
        sf.models.create("st-alignn-tiny", GENES)
    with pytest.raises(InputError, match="no configuration of a model"):
        sf.models.create(object(), GENES)


def test_the_table_of_models_counts_parameters_without_making_them():
    table = sf.models.list_models()
    assert {"st-align", "st-align-small", "st-align-tiny", "clip", "plip"} <= set(table.index)
    assert table.loc["st-align", "parameters"] > 3e8
    assert table.loc["st-align-tiny", "parameters"] < 1e6
