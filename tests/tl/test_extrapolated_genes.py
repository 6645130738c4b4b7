"""A gene that training knew from counts alone is predicted from H&E through its embedding, and said to be so."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import stfm as sf
from stfm.errors import StfmWarning
from stfm.training.recipes import RECIPES

BY_SLIDE = RECIPES["storm-small"].replace(batches="slide", epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def trained() -> tuple:
    both = sf.datasets.toy(n_spots=60, n_patients=3)
    paired = both[both.obs["library_id"] == "section_1", 40:].copy()
    counts = both[both.obs["library_id"] == "section_2"].copy()
    del counts.uns["spatial"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sf.tl.train([paired, counts], "storm-tiny", recipe=BY_SLIDE, stage="mask", validation=None)
    new = both[both.obs["library_id"] == "section_3", 40:].copy()
    return model, new, [str(name) for name in both.var_names]


def test_genes_known_from_counts_alone_are_marked_and_warned_of(trained, tmp_path):
    model, slide, names = trained
    assert model.written_genes().all()
    assert int(model.paired_genes().sum()) == len(names) - 40
    asked = [names[0], names[50], names[39]]
    adata = slide.copy()
    with pytest.warns(StfmWarning, match=rf"2 of 3 genes \('{names[0]}', '{names[39]}'\).*extrapolation"):
        sf.tl.predict_expression(adata, model=model, genes=asked)
    assert list(adata.uns["predicted_expression"]["extrapolated"]) == [names[0], names[39]]
    assert np.isfinite(adata.obsm["predicted_expression"].to_numpy()).all()
    adata.write_h5ad(tmp_path / "written.h5ad")


def test_nothing_is_extrapolated_unless_it_is_asked_for(trained, tmp_path):
    model, slide, _ = trained
    adata = slide.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.tl.predict_expression(adata, model=model)
    assert list(adata.obsm["predicted_expression"].columns) == [
        str(name) for name, kept in zip(model.vocabulary.names, model.paired_genes(), strict=True) if kept
    ]
    assert len(adata.uns["predicted_expression"]["extrapolated"]) == 0
    adata.write_h5ad(tmp_path / "written.h5ad")
    model.save(tmp_path / "model")
    assert (sf.models.load(tmp_path / "model").paired_genes() == model.paired_genes()).all()
