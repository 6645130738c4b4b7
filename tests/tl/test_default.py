"""Models by the name of their weights, and the one that is taken where none is given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import stfm as sf
from stfm._errors import InputError, MissingKeyError, StfmWarning
from stfm.tl._models import resolve_model
from stfm.training.recipes import Recipe
from stfm.weights.registry import WEIGHTS, WeightsSpec

RECIPE = Recipe(epochs=1, batch_size=32, lr=1e-3)


@pytest.fixture(scope="module")
def tissue():
    return sf.datasets.toy(n_spots=40, n_patients=2, n_genes=330, mpp=2.0)


@pytest.fixture(scope="module")
def trained(tissue, tmp_path_factory):
    """Return a trained model, as it comes back from its folder, and the folder."""
    model = sf.tl.train(tissue, "storm-tiny", epochs=1, stage="mask", genes=100)
    folder = model.save(tmp_path_factory.mktemp("weights") / "model", dtype="fp16")
    back, adata, other = sf.models.load(folder), tissue.copy(), tissue.copy()
    sf.tl.embed(adata, model)
    sf.tl.embed(other, back)
    before, after = adata.obsm["X_stfm"], other.obsm["X_stfm"]
    assert 0 < np.linalg.norm(after - before) < 1e-2 * np.linalg.norm(before), "fp16 keeps what a trained model says"
    return back, folder


@pytest.fixture
def rows(monkeypatch, trained):
    """Let the tiny model be the default, and be there under a name of its own."""
    _, folder = trained
    WEIGHTS.names()  # fills the table
    spec = dataclasses.replace(WEIGHTS.get("default"), version="7", packaged=folder, files={})
    other = WeightsSpec("mine", "a model of another package", packaged=folder, version="2")
    monkeypatch.setitem(WEIGHTS._specs, "default", spec)
    monkeypatch.setitem(WEIGHTS._specs, "mine", other)


@pytest.fixture
def none(monkeypatch, tmp_path):
    spec = dataclasses.replace(WEIGHTS.get("default"), packaged=tmp_path / "absent")
    monkeypatch.setitem(WEIGHTS._specs, "default", spec)


@pytest.mark.usefixtures("rows")
def test_embed_takes_the_default_and_says_so(tissue, trained):
    model, _ = trained
    adata, other = tissue.copy(), tissue.copy()
    sf.tl.embed(adata)
    sf.tl.embed(other, model)
    np.testing.assert_allclose(adata.obsm["X_stfm"], other.obsm["X_stfm"], atol=1e-6)
    found = adata.uns["X_stfm"]
    assert found["source"] == "default@7"
    assert found["model"] == "storm"
    assert found["weights_sha256"] == model.weights_sha256()
    assert found["stfm_version"] == sf.__version__


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(("name", "source"), [(None, "default@7"), ("default", "default@7"), ("mine", "mine@2")])
def test_a_name_gives_a_model_of_its_own(name, source, trained):
    model, where = resolve_model(name)
    assert where == source
    assert not model.training
    assert model.weights_sha256() == trained[0].weights_sha256()
    assert resolve_model(name)[0] is not model, "what one caller changes is not seen by another"


@pytest.mark.usefixtures("rows")
def test_every_way_in_takes_the_name(tissue, trained, tmp_path, monkeypatch):
    assert sf.models.load("default").weights_sha256() == trained[0].weights_sha256()
    (tmp_path / "default").mkdir()  # a folder of that name does not come before the weights
    monkeypatch.chdir(tmp_path)
    adata = tissue.copy()
    with pytest.warns(StfmWarning, match="in what the model saw"):
        sf.tl.predict_expression(adata, model="default")
    assert adata.uns["predicted_expression"]["source"] == "default@7"
    with pytest.warns(StfmWarning, match="not known to the model"):
        sf.tl.impute(adata, "default")
    assert adata.uns["imputed"]["source"] == "default@7"
    further = sf.tl.train(adata, init="default", recipe=RECIPE, stage="mask")
    assert further.weights_sha256() != trained[0].weights_sha256()
    assert list(further.vocabulary.names) == list(trained[0].vocabulary.names)


@pytest.mark.usefixtures("rows")
def test_a_model_trained_further_says_what_it_was_and_nothing_else_of_it(tissue, trained, tmp_path):
    told = sf.models.load(trained[1])
    told.about = sf.models.About(
        name="mine", licence="bsd-3-clause", text="Held out: mob.", results={"mob": {"r": 0.5}}
    )
    how = {"recipe": RECIPE, "stage": "mask"}
    once = sf.tl.train(tissue, told, **how)
    assert once.about == sf.models.About(licence="bsd-3-clause")
    assert told.about.name == "mine"
    assert told.seen.adapted_from == []
    first = {"name": "mine", "weights_sha256": told.weights_sha256()}
    assert once.seen.adapted_from == [first]
    folder = once.save(tmp_path / "once")
    assert sf.models.load(folder).seen.adapted_from == [first]
    card = (folder / "README.md").read_text()
    assert f"Adapted from mine (weights sha256 `{told.weights_sha256()}`).\n" in card
    assert "Held out" not in card
    assert "## Numbers" not in card
    twice = sf.tl.train(tissue, init=folder, **how)
    assert twice.seen.adapted_from == [first, {"name": "once", "weights_sha256": once.weights_sha256()}]
    assert [one["name"] for one in sf.tl.train(tissue, init="default", **how).seen.adapted_from] == ["default@7"]
    assert "itself adapted from mine" in (twice.save(tmp_path / "twice") / "README.md").read_text()


@pytest.mark.usefixtures("rows")
def test_a_new_model_keeps_what_was_said_of_it(tissue):
    new = sf.models.create("storm-tiny", sf.tl.train(tissue, init="default", recipe=RECIPE, stage="mask").vocabulary)
    new.about.text = "A first try."
    made = sf.tl.train(tissue, new, recipe=RECIPE, stage="mask")
    assert made.about.text == "A first try."
    assert made.seen.adapted_from == []


@pytest.mark.usefixtures("none")
def test_a_version_without_the_default_says_what_to_do(tissue):
    adata = tissue.copy()
    for give in (None, "default"):
        with pytest.raises(InputError, match=r"do not come with this version: give a trained model \(sf\.tl\.train"):
            sf.tl.embed(adata, give)
    assert "X_stfm" not in adata.obsm
    with pytest.raises(InputError, match="do not come with this version"):
        sf.tl.train(adata, init="default")


@pytest.mark.usefixtures("rows")
def test_a_wrong_name_is_told(tissue, monkeypatch):
    with pytest.raises(MissingKeyError, match="Did you mean 'default'"):
        sf.tl.embed(tissue.copy(), "defautl")
    with pytest.raises(MissingKeyError, match="no folder defualt .* Did you mean 'default'"):
        sf.tl.train(tissue, init="defualt", recipe=RECIPE)
    table = WeightsSpec("vocabulary", "genes", kind="table")
    monkeypatch.setitem(WEIGHTS._specs, "vocabulary", table)
    with pytest.raises(InputError, match="'vocabulary' are no model"):
        sf.models.load("vocabulary")
    with pytest.raises(MissingKeyError, match=r"There are: 'default', 'mine'\.$"):
        sf.tl.embed(tissue.copy(), "uni")
