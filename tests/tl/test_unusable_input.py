"""Data of which no model could tell anything are refused, with the object untouched."""

from __future__ import annotations

import numpy as np
import pytest

import stfm as sf
from stfm._errors import InputError
from stfm.training.recipes import Recipe

RECIPE = Recipe(epochs=1, batch_size=32, lr=1e-3)


@pytest.fixture(scope="module")
def tissue():
    return sf.datasets.toy(n_spots=40, n_sections=2, n_patients=2, n_genes=330, mpp=2.0)


@pytest.fixture(scope="module")
def model(tissue):
    return sf.tl.train(tissue, "storm-tiny", recipe=RECIPE, genes=100)


@pytest.fixture
def adata(tissue):
    return tissue.copy()


READERS = {
    "embed": sf.tl.embed,
    "train": lambda adata, model: sf.tl.train(adata, init=model, recipe=RECIPE),
    "predict_expression": lambda adata, model: sf.tl.predict_expression(adata, model=model),
    "impute": lambda adata, model: sf.tl.impute(adata, model, genes=list(model.vocabulary.names[:2])),
    "reference": lambda adata, _: sf.tl.fit_expression(adata, features="handcrafted", contexts_um=(100.0,), rings=0),
}


def refused(reader, adata, model, match):
    before = {slot: sorted(getattr(adata, slot)) for slot in ("obs", "obsm", "uns", "obsp", "layers")}
    with pytest.raises(InputError, match=match):
        READERS[reader](adata, model)
    assert {slot: sorted(getattr(adata, slot)) for slot in before} == before


@pytest.mark.parametrize("reader", READERS)
def test_an_image_that_is_not_under_the_spots(adata, model, reader):
    second = (adata.obs["library_id"] == "section_2").to_numpy()
    adata.obsm["spatial"][second] += 1e5
    n = int(second.sum())
    refused(
        reader, adata, model, rf"Library 'section_2': {n} of {n} spots lie off the image .* section.* full-resolution"
    )


def test_some_spots_off_the_image_are_as_before(adata, model):
    few = np.flatnonzero(adata.obs["library_id"] == "section_2")[:3]
    adata.obsm["spatial"][few] += 1e5
    sf.tl.embed(adata, model)
    assert np.isfinite(adata.obsm["X_stfm"]).all()


@pytest.mark.parametrize("reader", READERS)
def test_spots_at_one_place(adata, model, reader):
    adata.obsm["spatial"][:] = 300.0
    refused(reader, adata, model, r"all \d+ spots lie at one place \(300, 300\).* fill in their coordinates")


def test_one_spot_has_one_place(adata):
    assert sf.slide.as_slides(adata[:1].copy())[0].n_obs == 1


@pytest.mark.parametrize("reader", ["embed", "train"])
def test_counts_all_zero(adata, model, reader):
    adata.X = adata.X * 0
    refused(reader, adata, model, r"Library 'section_1': all counts of its \d+ spots are zero; .*adata\.X = None")


def test_counts_of_a_file_all_zero(adata, model, tmp_path):
    adata.X = adata.X * 0
    adata.write_h5ad(tmp_path / "zero.h5ad")
    with pytest.raises(InputError, match="are zero"):
        sf.tl.train(tmp_path / "zero.h5ad", init=model, recipe=RECIPE)
