"""The model in the wheel: there, small, offline, for both species, with either modality missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import stfm as sf
from stfm.weights import path

OFFLINE = """
import json, sys
import numpy as np
import stfm as sf
adata = sf.datasets.toy(n_spots=60)
sf.tl.embed(adata)
found = {key: list(adata.obsm[key].shape) for key in adata.obsm if key.startswith("X_stfm")}
finite = all(bool(np.isfinite(adata.obsm[key]).all()) for key in found)
loaded = [name for name in ("timm", "torchvision", "transformers", "huggingface_hub") if name in sys.modules]
print(json.dumps({"found": found, "finite": finite, "loaded": loaded, "source": adata.uns["X_stfm"]["source"]}))
"""


@pytest.fixture(scope="module")
def tissue():
    return sf.datasets.toy(n_spots=90)


def test_it_embeds_offline_without_other_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("STFM_OFFLINE", "1")
    monkeypatch.setenv("STFM_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OFFLINE], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["found"]["X_stfm"] == [60, 64]
    assert set(said["found"]) == {"X_stfm", "X_stfm_image", "X_stfm_gene", "X_stfm_niche"}
    assert said["finite"]
    assert said["loaded"] == []
    assert said["source"] == "default@2"


def test_it_is_small_and_says_what_it_saw():
    folder = path("default")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40e6
    model = sf.models.load("default")
    assert model.seen.studies == ["her2st", "mob", "dlpfc"]
    assert set(model.seen.patients) == {"B", "C", "D", "F", "H", "animal_1", "Br8100"}
    assert not {"E1", "E2", "G1", "G2", "MOB3", "151675"} & set(model.seen.slides)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "What it did not see" in card
    assert "bsd-3-clause" in card


def test_mouse_symbols_are_read_as_human_ones(tissue):
    human = ad.AnnData(tissue.X.copy(), obs=tissue.obs.copy(), var=tissue.var.copy(), obsm=dict(tissue.obsm))
    mouse = human.copy()
    mouse.var_names = [name.capitalize() for name in human.var_names]
    for adata in (human, mouse):
        sf.tl.embed(adata, mpp=1.0)
        assert "X_stfm_image" not in adata.obsm
    np.testing.assert_allclose(human.obsm["X_stfm"], mouse.obsm["X_stfm"], atol=1e-6)


def test_an_image_alone_is_enough(tissue):
    adata = ad.AnnData(np.zeros((tissue.n_obs, 0), np.float32), obs=tissue.obs.copy(), uns=dict(tissue.uns))
    adata.obsm["spatial"] = tissue.obsm["spatial"]
    sf.tl.embed(adata)
    assert adata.obsm["X_stfm"].shape == (tissue.n_obs, 64)
    assert np.isfinite(adata.obsm["X_stfm"]).all()
    assert "X_stfm_gene" not in adata.obsm


def test_few_labels_go_further_than_on_components_on_a_patient_it_never_saw(shared_data):
    """The benchmark has the numbers; here only that what ships is of use."""
    import scanpy as sc
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    adata = ad.read_h5ad(shared_data / "h5ad" / "her2st_G2.h5ad")
    sf.tl.embed(adata, mpp=0.68)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=30)
    labels = adata.obs["label"].astype(str).to_numpy()
    known = np.flatnonzero(~np.isin(labels, ["nan", "undetermined"]))
    right = {"X_stfm": [], "X_pca": []}
    for draw in range(10):
        order = np.random.default_rng(draw).permutation(known)
        shown = np.concatenate([order[labels[order] == name][:5] for name in np.unique(labels[known])])
        asked = np.setdiff1d(known, shown)
        for key, found in right.items():
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            model.fit(adata.obsm[key][shown], labels[shown])
            found.append(model.score(adata.obsm[key][asked], labels[asked]))
    assert np.mean(right["X_stfm"]) > np.mean(right["X_pca"]) + 0.05


def test_what_ships_is_what_was_measured():
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "default.json"
    measured = json.loads(results.read_text(encoding="utf-8"))
    assert measured["model"]["weights_sha256"] == sf.models.load("default").weights_sha256()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_an_embedding_does_not_depend_on_the_batch(tissue, batch_size):
    whole, parts = tissue[:40].copy(), tissue[:40].copy()
    sf.tl.embed(whole)
    sf.tl.embed(parts, batch_size=batch_size)
    for key in ("X_stfm", "X_stfm_image", "X_stfm_gene", "X_stfm_niche"):
        size = np.abs(whole.obsm[key]).max()
        np.testing.assert_allclose(parts.obsm[key], whole.obsm[key], rtol=0, atol=1e-5 * max(1.0, size))
