"""The report of gene matching on AnnData."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stfm as sf
from stfm.errors import InputError, MissingKeyError, WrongTypeError
from stfm.slide.genes import Vocabulary


@pytest.fixture
def adata() -> ad.AnnData:
    var = pd.DataFrame({"mine": ["EPCAM", "CD3E", "ACTB"]}, index=["p1", "p2", "p3"])
    return ad.AnnData(np.ones((2, 3), dtype=np.float32), var=var)


def test_by_a_chosen_column(adata):
    match = sf.pp.match_genes(adata, ["actb", "epcam"], var_key="mine")
    assert match.source_index.tolist() == [2, 0]
    assert "2 of 2 vocabulary genes measured" in match.report
    assert list(adata.var.columns) == ["mine"]


def test_vocabulary_in_every_form(adata, tmp_path):
    vocabulary = Vocabulary(np.array(["CD3E", "EPCAM", "KRT8"]))
    vocabulary.save(tmp_path / "genes.txt")
    forms = [vocabulary, SimpleNamespace(vocabulary=vocabulary), vocabulary.names, tuple(vocabulary.names)]
    forms += [tmp_path / "genes.txt", str(tmp_path / "genes.txt")]
    for form in forms:
        assert sf.pp.match_genes(adata, form, var_key="mine").source_index.tolist() == [1, 0]


def test_species_can_be_said(adata):
    match = sf.pp.match_genes(adata, ["EPCAM", "CD3E"], var_key="mine", species="mouse")
    assert "mouse genes taken as human orthologues" in match.report


def test_refusals(adata):
    with pytest.raises(InputError, match="only 0 of 2 genes match.*p1, p2, p3.*into adata.var_names"):
        sf.pp.match_genes(adata, ["EPCAM", "CD3E"])
    with pytest.raises(MissingKeyError, match="'symbol' is no column of var"):
        sf.pp.match_genes(adata, ["EPCAM"], var_key="symbol")
    with pytest.raises(InputError, match="species='rat' is unknown"):
        sf.pp.match_genes(adata, ["EPCAM"], species="rat")
    with pytest.raises(WrongTypeError, match="adata must be AnnData, got list"):
        sf.pp.match_genes([], ["EPCAM"])
    with pytest.raises(WrongTypeError, match="no vocabulary"):
        sf.pp.match_genes(adata, SimpleNamespace(vocabulary=None))
    with pytest.raises(WrongTypeError, match="got int"):
        sf.pp.match_genes(adata, 7)


def test_real_panels(shared_data):
    mouse = ad.read_h5ad(shared_data / "h5ad" / "mob_rep11.h5ad")
    human = ad.read_h5ad(shared_data / "h5ad" / "her2st_C2.h5ad")
    match = sf.pp.match_genes(mouse, list(human.var_names))
    assert match.n_matched > 10_000
    assert "mouse genes taken as human orthologues" in match.report
    ids = ad.read_h5ad(shared_data / "h5ad" / "mob_1.h5ad")
    unversioned = [name.partition(".")[0] for name in ids.var_names]
    assert sf.pp.match_genes(ids, unversioned).n_matched == 1000
    with pytest.raises(InputError, match="by symbol only"):
        sf.pp.match_genes(ids, list(human.var_names))
