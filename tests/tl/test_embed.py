"""``tl.embed``: what it writes, where, and what it refuses with the object untouched."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import anndata
import numpy as np
import pytest
from fake_model import FakeConfig, FakeModel

import stfm as sf
from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.inference.contexts import warn_coarse
from stfm.models.inputs import InputSpec
from stfm.slide.genes import Vocabulary
from stfm.training.recipes import Recipe

RECIPE = Recipe(epochs=1, batch_size=32, lr=1e-3)
PARTS = ["X_stfm_image", "X_stfm_gene", "X_stfm_niche"]


@pytest.fixture(scope="module")
def tissue():
    return sf.datasets.toy(n_spots=40, n_patients=2, n_genes=330, mpp=2.0)


@pytest.fixture(scope="module")
def model(tissue):
    return sf.tl.train(tissue, "st-align-tiny", recipe=RECIPE, genes=100)


@pytest.fixture
def adata(tissue):
    return tissue.copy()


def embedded(adata, model, **kwargs):
    sf.tl.embed(adata, model, **kwargs)
    return adata.obsm["X_stfm"]


def snapshot(adata):
    return {slot: sorted(getattr(adata, slot)) for slot in ("obs", "obsm", "uns", "obsp", "layers")}


def test_slots(adata, model):
    assert sf.tl.embed(adata, model) is None
    for key in ["X_stfm", *PARTS]:
        assert adata.obsm[key].dtype == np.float32, key
        assert len(adata.obsm[key]) == adata.n_obs
        assert np.isfinite(adata.obsm[key]).all()
    record = adata.uns["X_stfm"]
    assert record["model"] == "st-align"
    assert record["weights_sha256"] == model.weights_sha256()
    assert record["genes_total"] == 100
    assert record["genes_matched"].tolist() == [100, 100]
    assert record["mpp"].tolist() == [2.0, 2.0]
    assert record["libraries"].tolist() == ["section_1", "section_2"]
    assert record["seen_in_training"].tolist() == [True, True]
    assert record["params"]["batch_size"] == 256


def test_the_record_goes_to_disk_and_back(adata, model, tmp_path):
    sf.tl.embed(adata, model)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.obsm["X_stfm"], adata.obsm["X_stfm"])
    assert back.uns["X_stfm"]["weights_sha256"] == model.weights_sha256()


def test_copy_and_key_added(adata, model):
    before = snapshot(adata)
    other = sf.tl.embed(adata, model, key_added="X_mine", copy=True)
    assert snapshot(adata) == before
    assert {"X_mine", "X_mine_image", "X_mine_gene", "X_mine_niche"} <= set(other.obsm)
    assert "X_mine" in other.uns
    assert "X_stfm" not in other.obsm


@pytest.mark.parametrize("batch_size", [1, 7, 33])
def test_same_for_any_batch_size(adata, model, batch_size):
    whole = embedded(adata.copy(), model)
    np.testing.assert_allclose(embedded(adata, model, batch_size=batch_size), whole, atol=1e-5)


def test_order_of_spots_across_libraries(adata, model):
    whole = embedded(adata, model)
    # libraries interleaved; the order within each stays, since it decides which of equally near neighbours count
    order = np.argsort(adata.obs.groupby("library_id", observed=True).cumcount().to_numpy(), kind="stable")
    assert adata.obs["library_id"].iloc[order].tolist()[:2] == ["section_1", "section_2"]
    mixed = adata[order].copy()
    np.testing.assert_allclose(embedded(mixed, model), whole[order], atol=1e-5)


def test_cached_features_and_tiles_agree(adata, model):
    whole = embedded(adata.copy(), model, cache_features=False)
    np.testing.assert_allclose(embedded(adata, model), whole, atol=1e-5)


def test_without_image(adata, model):
    sf.tl.embed(adata, model)
    del adata.uns["spatial"]
    sf.tl.embed(adata, model, mpp=2.0)
    assert "X_stfm_image" not in adata.obsm  # the one of the earlier call is gone too
    assert np.isfinite(adata.obsm["X_stfm"]).all()
    assert np.isfinite(adata.obsm["X_stfm_gene"]).all()


def test_without_counts(adata, model):
    pictures = anndata.AnnData(obs=adata.obs, obsm={"spatial": adata.obsm["spatial"]}, uns=adata.uns)
    sf.tl.embed(pictures, model)
    assert "X_stfm_gene" not in pictures.obsm
    assert np.isfinite(pictures.obsm["X_stfm_image"]).all()
    assert np.isfinite(pictures.obsm["X_stfm"]).all()


def test_image_of_one_library_only(adata, model):
    del adata.uns["spatial"]["section_2"]["images"]
    with pytest.warns(StfmWarning, match="'section_2' lacks a modality that others have: image is nan"):
        sf.tl.embed(adata, model)
    there = (adata.obs["library_id"] == "section_1").to_numpy()
    assert np.isfinite(adata.obsm["X_stfm_image"][there]).all()
    assert np.isnan(adata.obsm["X_stfm_image"][~there]).all()
    assert np.isfinite(adata.obsm["X_stfm"]).all()


def test_saved_model_by_its_folder(adata, model, tmp_path):
    folder = model.save(tmp_path / "model")
    np.testing.assert_array_equal(embedded(adata.copy(), str(folder)), embedded(adata, model))
    sf.tl.embed(adata, folder)
    assert adata.uns["X_stfm"]["source"] == str(folder)


def test_one_spot(adata, model):
    one = adata[:1].copy()
    assert embedded(one, model, mpp=2.0).shape == (1, 128)


def test_a_view_is_made_whole_with_a_warning(adata, model):
    view = adata[adata.obs["library_id"] == "section_1"]
    with pytest.warns(StfmWarning, match="adata is a view"):
        sf.tl.embed(view, model)
    assert not view.is_view
    assert len(view.obsm["X_stfm"]) == 40
    assert "X_stfm" not in adata.obsm


def test_a_backed_object_is_streamed(adata, model, tmp_path):
    whole = embedded(adata.copy(), model)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    try:
        np.testing.assert_allclose(embedded(backed, model), whole, atol=1e-5)
        assert backed.isbacked
    finally:
        backed.file.close()


def test_fewer_genes_than_the_vocabulary(adata, model):
    kept = adata[:, [name not in model.vocabulary.names[:30] for name in adata.var_names]].copy()
    sf.tl.embed(kept, model)
    assert kept.uns["X_stfm"]["genes_matched"].tolist() == [70, 70]


def _foreign(adata):
    adata.var_names = [f"XYZ{i}" for i in range(adata.n_vars)]


def _normalised(adata):
    adata.X = adata.X * 0.31


def _negative(adata):
    adata.X = adata.X * -1


def _nan(adata):
    adata.X.data[5] = np.nan


def _no_spatial(adata):
    del adata.obsm["spatial"]


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (_foreign, InputError, "0 of .* genes match"),
        (_normalised, InputError, "layer="),
        (_negative, InputError, "negative"),
        (_nan, InputError, "nan"),
        (_no_spatial, MissingKeyError, "no 'spatial'"),
    ],
)
def test_unusable_data_are_refused_and_left_alone(adata, model, spoil, error, match):
    spoil(adata)
    before = snapshot(adata)
    with pytest.raises(error, match=match):
        sf.tl.embed(adata, model)
    assert snapshot(adata) == before


def test_empty(adata, model):
    with pytest.raises(InputError, match="no spots"):
        sf.tl.embed(adata[:0].copy(), model)


def test_which_model(adata, model, tmp_path):
    before = snapshot(adata)
    with pytest.raises(InputError, match="No weights of 'st-align-small' come with this version: train it"):
        sf.tl.embed(adata, "st-align-small")
    with pytest.raises(MissingKeyError, match="Did you mean 'st-align-small'"):
        sf.tl.embed(adata, "st-align-smal")
    with pytest.raises(MissingKeyError, match="no saved model"):
        sf.tl.embed(adata, tmp_path)
    with pytest.raises(WrongTypeError, match="model must be a model or the folder"):
        sf.tl.embed(adata, 3)
    with pytest.raises(WrongTypeError, match="adata must be AnnData, got ndarray"):
        sf.tl.embed(np.zeros((3, 2)), model)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        sf.tl.embed(adata, model, batch_size=0)
    with pytest.raises(InputError, match="device='tpu'"):
        sf.tl.embed(adata, model, device="tpu")
    assert snapshot(adata) == before


def test_checkpoint_of_another_architecture(adata, model, tmp_path):
    folder = model.save(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"width": 64', '"width": 32'))
    with pytest.raises(DataIntegrityError, match="another architecture"):
        sf.tl.embed(adata, folder)
    (folder / "config.json").write_text(config)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(DataIntegrityError, match="no whole safetensors file"):
        sf.tl.embed(adata, folder)


def test_nothing_is_written_when_the_model_fails(adata, model, monkeypatch):
    before = snapshot(adata)

    def fail(self, batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "embed", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sf.tl.embed(adata, model)
    assert snapshot(adata) == before


def test_a_model_that_reads_no_image_is_fed_with_counts_alone(adata):
    class GenesOnly(FakeModel):
        @property
        def inputs(self):
            return InputSpec(spot_px=None, niche_px=None, niche_counts=False)

    sf.tl.embed(adata, GenesOnly(FakeConfig(), Vocabulary(adata.var_names[:20].to_numpy())))
    assert sorted(k for k in adata.obsm if k.startswith("X_stfm")) == ["X_stfm", "X_stfm_gene"]


class Tiles(FakeModel):
    """Reads tiles of one size in µm, whatever the spots."""

    px: ClassVar[int] = 24
    um: ClassVar[float | None] = 112.0

    @property
    def inputs(self):
        return InputSpec(spot_px=self.px, niche_px=None, spot_um=self.um, niche_counts=False)


def test_an_image_too_coarse_for_the_tiles_is_told_once(adata, monkeypatch):
    coarse = sf.datasets.toy(n_spots=40, n_patients=2, n_genes=330, mpp=16.0)
    model = Tiles(FakeConfig(), Vocabulary(adata.var_names[:20].to_numpy()))
    with pytest.warns(StfmWarning) as told:
        sf.tl.embed(coarse, model)
    libraries = "library 'section_1' (16 µm/px, 7 px a tile), library 'section_2' (16 µm/px, 7 px a tile); give"
    (message,) = [str(one.message) for one in told]
    assert message.startswith("The model reads tiles of 112 µm, and the H&E is too coarse")
    assert libraries in message
    assert told[0].filename == __file__
    sf.tl.embed(adata, model)  # 2 µm/px: no warning, which would be an error here
    # nor where the model shows no more px than there are, or takes tiles of the spots' own size, or there is no H&E
    for name, value in (("px", 7), ("um", None)):
        with monkeypatch.context() as patch:
            patch.setattr(Tiles, name, value)
            sf.tl.embed(coarse, model)
    del coarse.uns["spatial"]
    sf.tl.embed(coarse, model, mpp=16.0)


@pytest.mark.parametrize(("mpp", "coarse"), [(0.5, False), (4.4, False), (7.0, False), (7.1, True), (16.0, True)])
def test_what_is_too_coarse(mpp, coarse):
    """112 µm of the olfactory bulb's image at 4.4 µm/px are 25 px; of low-resolution Visium at 16 µm/px they are 7."""
    slides = [SimpleNamespace(name=f"s{i}", tiles=SimpleNamespace(native_mpp=mpp)) for i in range(5)]
    spec = InputSpec(spot_px=224, contexts_um=(448.0, 112.0))
    with pytest.warns(StfmWarning, match="'s2' .* and 2 more; give") if coarse else nullcontext():
        warn_coarse([*slides, SimpleNamespace(name="without", tiles=None)], spec, stacklevel=2)
