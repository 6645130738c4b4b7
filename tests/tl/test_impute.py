"""Expression of measured slides: denoised, filled in, refused."""

from __future__ import annotations

import copy

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import stfm as sf
from stfm._errors import InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.slide.genes import Vocabulary

CONFIG = {"width": 32, "heads": 4, "window": 19, "max_genes": 200}


@pytest.fixture(scope="module")
def tissue() -> ad.AnnData:
    return sf.datasets.toy(n_spots=90, n_sections=3, n_patients=3, n_genes=330, image=False)


@pytest.fixture(scope="module")
def model(tissue: ad.AnnData):
    known = tissue[tissue.obs["library_id"] != "section_3"].copy()
    return sf.tl.train(known, "storm-tiny", config=CONFIG, stage="mask", epochs=6, batch_size=32, lr=3e-3,
                       genes="all", validation=None)  # fmt: skip


@pytest.fixture
def section(tissue: ad.AnnData) -> ad.AnnData:
    return tissue[tissue.obs["library_id"] == "section_3"].copy()


def log_normalised(counts: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))


def test_writes_a_layer_on_the_panel(section, model, tmp_path):
    before = section.X.copy()
    assert sf.tl.impute(section, model) is None
    table = section.layers["imputed"]
    assert table.shape == section.shape
    assert table.dtype == np.float32
    assert np.isfinite(table).all()
    assert (before != section.X).nnz == 0
    note = section.uns["imputed"]
    assert (note["by"], note["n_measured"], note["n_genes"]) == ("storm", section.n_obs, section.n_vars)
    section.write_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "a.h5ad").layers["imputed"], table)


def test_what_is_made_of_one_half_of_the_counts_tells_of_the_other(section, model):
    half, other = sf.metrics.thin(section.X.toarray(), rng=0)
    section.X = np.asarray(half, dtype=np.float32)
    sf.tl.impute(section, model)
    truth = log_normalised(np.asarray(other, dtype=np.float64))
    chosen = np.argsort(-truth.var(axis=0))[:100]
    r = sf.metrics.gene_pearson(truth[:, chosen], section.layers["imputed"][:, chosen])
    assert float(r.mean()) > 0.1


def test_genes_that_a_slide_lacks_are_filled_in(section, model):
    truth = log_normalised(section.X.toarray())
    order = np.argsort(-truth.var(axis=0))
    absent = section.var_names[order[:30:3]]
    panel = section[:, ~section.var_names.isin(absent)].copy()
    sf.tl.impute(panel, model, genes=list(absent))
    table, spread = panel.obsm["imputed"], panel.obsm["imputed_sd"]
    assert table.columns.tolist() == spread.columns.tolist() == list(absent)
    assert (spread > 0).all(axis=None)
    columns = section.var_names.get_indexer(absent)
    assert float(sf.metrics.gene_pearson(truth[:, columns], table.to_numpy()).mean()) > 0.1
    assert "imputed" not in panel.layers


def test_only_measured_spots_are_used(section, model):
    section.obs["measured"] = np.arange(section.n_obs) < 60
    other = section.copy()
    counts = other.X.toarray()
    counts[70, :40] = 9.0
    other.X = counts
    for one in (section, other):
        sf.tl.impute(one, model, measured_key="measured")
    np.testing.assert_array_equal(section.layers["imputed"], other.layers["imputed"])
    assert section.uns["imputed"]["n_measured"] == 60


def test_genes_that_the_model_does_not_know_are_nan(section, model):
    section.var_names = [*section.var_names[:-2], "STRANGE1", "STRANGE2"]
    with pytest.warns(StfmWarning, match="2 of 330 genes are not known to the model; they are nan"):
        sf.tl.impute(section, model)
    missing = np.isnan(section.layers["imputed"]).all(axis=0)
    assert section.var_names[missing].tolist() == ["STRANGE1", "STRANGE2"]
    assert not np.isnan(section.layers["imputed"][:, ~missing]).any()


def test_copy_folder_and_several_libraries(tissue, model, tmp_path):
    model.save(tmp_path / "m")
    new = sf.tl.impute(tissue, tmp_path / "m", key_added="smooth", copy=True)
    assert "smooth" not in tissue.layers
    assert new.uns["smooth"]["source"] == str(tmp_path / "m")
    alone = tissue[tissue.obs["library_id"] == "section_2"].copy()
    sf.tl.impute(alone, model)
    rows = (tissue.obs["library_id"] == "section_2").to_numpy()
    np.testing.assert_allclose(new.layers["smooth"][rows], alone.layers["imputed"], atol=1e-5)


def test_an_image_too_coarse_for_the_tiles_is_told(model):
    coarse = sf.datasets.toy(n_spots=60, n_genes=330, mpp=16.0)
    with pytest.warns(StfmWarning, match=r"tiles of 224 µm, .* \(16 µm/px, 14 px a tile\).* image=") as told:
        sf.tl.impute(coarse, model)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_two_columns_of_one_gene_are_both_written(section, model):
    names = list(section.var_names)
    section.var_names = [*names[:1], names[0].lower(), *names[2:]]
    with pytest.warns(StfmWarning):
        sf.tl.impute(section, model)
    table = section.layers["imputed"]
    np.testing.assert_array_equal(table[:, 0], table[:, 1])
    assert np.isfinite(table).all()


def test_genes_are_asked_for_by_ensembl_id_too(section, model):
    names = model.vocabulary.names
    ids = np.array([f"ENSG{i:011d}" for i in range(len(names))])
    mouse = np.array([f"ENSMUSG{i:011d}" if i else "" for i in range(len(names))])
    known = copy.deepcopy(model)
    known.vocabulary = Vocabulary(names, ids, "human", mouse)
    asked = [f"{ids[3].lower()}.14", str(mouse[5]), str(names[7]).lower()]
    sf.tl.impute(section, known, genes=asked)
    written = section.obsm["imputed"]
    assert list(written.columns) == asked
    sf.tl.impute(section, known, genes=list(map(str, names[[3, 5, 7]])))
    np.testing.assert_array_equal(written, section.obsm["imputed"])
    for twice in ([str(names[3]), str(ids[3])], [str(ids[5]), str(mouse[5])]):
        with pytest.raises(InputError, match=f"names '{twice[1]}' twice .as '{twice[0]}' too.; name each gene once"):
            sf.tl.impute(section, known, genes=twice)
    with pytest.raises(InputError, match="does not know gene 'ENSG99999999999'"):
        sf.tl.impute(section, known, genes=["ENSG99999999999"])


def test_a_panel_of_ensembl_ids_is_written_whole(section, model):
    known = copy.deepcopy(model)
    names = known.vocabulary.names
    ids = {str(name): f"ENSG{i:011d}" for i, name in enumerate(names)}
    known.vocabulary = Vocabulary(names, np.array(list(ids.values())), "human")
    sf.tl.impute(section, known)
    by_name = section.layers["imputed"]
    section.var_names = [ids[str(name)] for name in section.var_names]
    sf.tl.impute(section, known)
    np.testing.assert_array_equal(section.layers["imputed"], by_name)
    section.var["gene_ids"] = list(section.var_names)
    section.var_names = [f"probe {i}" for i in range(section.n_vars)]
    sf.tl.impute(section, known)
    np.testing.assert_array_equal(section.layers["imputed"], by_name)


def test_guards_leave_the_object_untouched(section, model):
    section.obs["said"] = ["no", "yes"] * (section.n_obs // 2)
    strange = section.copy()
    strange.var_names = [f"STRANGE{i}" for i in range(strange.n_vars)]
    bare = ad.AnnData(obs=section.obs.copy(), obsm={"spatial": section.obsm["spatial"].copy()})
    bare.var = pd.DataFrame(index=section.var_names[:0])
    for adata, options, error, message in (
        (section, {"genes": ["ERBB"]}, InputError, "does not know gene 'ERBB'. Did you mean"),
        (section, {"genes": []}, InputError, "genes is empty"),
        (section, {"genes": "ERBB2"}, InputError, r"is one name; give a list of names, genes=\['ERBB2'\]"),
        (section, {"genes": ["ERBB2", "MUC1", "ERBB2"]}, InputError, "names 'ERBB2' twice; name each gene once"),
        (section, {"genes": ["ERBB2", "erbb2"]}, InputError, "names 'erbb2' twice .as 'ERBB2' too"),
        (section, {"measured_key": "said"}, InputError, r"obs\['said'\] must hold .*\['said'\] == 'no'\."),
        (section, {"measured_key": "no"}, MissingKeyError, "no column 'no'"),
        (section, {"key_added": ""}, InputError, "key_added"),
        (strange, {}, InputError, "writes none of the 330 genes"),
    ):
        with pytest.raises(error, match=message):
            sf.tl.impute(adata, model, **options)
        assert "imputed" not in adata.layers
        assert "imputed" not in adata.obsm
    with pytest.raises(WrongTypeError, match="must be a model or the folder"):
        sf.tl.impute(section, 3)
    with pytest.raises(InputError, match="No weights of 'storm-tiny' come with this version: train it"):
        sf.tl.impute(section, "storm-tiny")
    with pytest.raises(InputError, match="writes no expression"):
        sf.tl.impute(section, sf.models.create("st-align-tiny", model.vocabulary), genes=["ERBB2"])
