"""``tl.attribute`` and ``pl.attribution``."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import stfm as sf
from stfm._errors import InputError, MissingKeyError, WrongTypeError

pytest.importorskip("captum", reason="the extra attribution is not installed")

CONFIG = {"width": 16, "heads": 2, "gene_width": 4, "window": 9, "contexts_um": (112.0,), "spot_px": 28}
STEPS = {"n_steps": 8}


@pytest.fixture(scope="module")
def tissue() -> ad.AnnData:
    return sf.datasets.toy(n_spots=60, n_sections=2, n_patients=2, n_genes=330, mpp=4.0)


@pytest.fixture(scope="module")
def model(tissue: ad.AnnData):
    return sf.tl.train(tissue, "storm-tiny", config=CONFIG, stage="mask", epochs=2, genes=100, validation=None)


@pytest.fixture
def explained(tissue: ad.AnnData, model) -> ad.AnnData:
    gene = str(model.vocabulary.names[0])
    return sf.tl.attribute(tissue, model, target=gene, spots=list(tissue.obs_names[[5, 70]]), copy=True, **STEPS)


def test_writes_slots(explained: ad.AnnData, tissue: ad.AnnData, model, tmp_path):
    assert "attribution" not in tissue.obs
    parts = explained.obs[["attribution", "attribution_image", "attribution_gene"]]
    seen = parts.notna()
    assert (seen.sum(axis=1).isin([0, 3])).all()
    assert 2 <= int(seen["attribution"].sum()) <= 18
    np.testing.assert_allclose(parts["attribution"], parts["attribution_image"] + parts["attribution_gene"])
    note = explained.uns["attribution"]
    assert note["spots"].index.tolist() == tissue.obs_names[[5, 70]].tolist()
    assert note["spots"]["attributed"].sum() == pytest.approx(parts["attribution"].sum())
    assert note["genes"].shape == (100, 2)
    assert note["genes"].to_numpy().sum() == pytest.approx(parts["attribution_gene"].sum())
    assert (note["method"], note["target"], note["model"]) == (
        "integrated_gradients", str(model.vocabulary.names[0]), "storm",
    )  # fmt: skip
    explained.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_allclose(again.uns["attribution"]["genes"], note["genes"])


def test_complete(tissue: ad.AnnData, model):
    one = tissue.copy()
    sf.tl.attribute(one, model, target=str(model.vocabulary.names[3]), spots=one.obs_names[20], n_steps=200)
    table = one.uns["attribution"]["spots"].iloc[0]
    moved = one.obs[["attribution_image", "attribution_gene"]].abs().to_numpy()
    assert abs(table["attributed"] - (table["output"] - table["baseline"])) < 0.01 * np.nansum(moved)


def test_output_is_the_prediction(tissue: ad.AnnData, model):
    one, gene = tissue.copy(), str(model.vocabulary.names[3])
    sf.tl.attribute(one, model, target=gene, spots=one.obs_names[20], use_counts=False, **STEPS)
    assert "attribution_gene" not in one.obs
    assert "genes" not in one.uns["attribution"]
    with pytest.warns(UserWarning, match="tells nothing"):
        sf.tl.predict_expression(one, model=model, genes=[gene])
    predicted = one.obsm["predicted_expression"].loc[one.obs_names[20], gene]
    assert one.uns["attribution"]["spots"]["output"].iloc[0] == pytest.approx(predicted, abs=1e-4)


def test_direction_of_the_embedding(tissue: ad.AnnData, model, tmp_path):
    one = tissue.copy()
    sf.tl.embed(one, model)
    direction = one.obsm["X_stfm"][:60].mean(axis=0) - one.obsm["X_stfm"][60:].mean(axis=0)
    sf.tl.attribute(one, model.save(tmp_path / "m"), target=direction, spots=one.obs_names[7], key_added="why", **STEPS)
    note = one.uns["why"]
    assert note["target"] == "direction of the embedding"
    assert note["spots"]["output"].iloc[0] == pytest.approx(float(one.obsm["X_stfm"][7] @ direction), abs=1e-4)
    assert one.obs["why_gene"].notna().any()


def test_spots_are_named_once_and_parts_of_an_earlier_run_go(tissue: ad.AnnData, model):
    one, gene = tissue.copy(), str(model.vocabulary.names[3])
    sf.tl.attribute(one, model, target=gene, spots=[one.obs_names[20]] * 2, **STEPS)
    assert len(one.uns["attribution"]["spots"]) == 1
    sf.tl.attribute(one, model, target=gene, spots=one.obs_names[20], use_counts=False, **STEPS)
    assert "attribution_gene" not in one.obs


def test_guards_leave_the_object_untouched(tissue: ad.AnnData, model):
    one, gene, spot = tissue.copy(), str(model.vocabulary.names[0]), str(tissue.obs_names[0])
    for options, error, message in (
        ({"target": gene + "X", "spots": spot}, InputError, "does not know gene .* Did you mean"),
        ({"target": np.ones(3), "spots": spot}, InputError, r"a direction of this embedding has \d+ values"),
        ({"target": np.zeros(32), "spots": spot}, InputError, "not all 0"),
        ({"target": np.ones((2, 16)), "spots": spot}, InputError, r"shape \(2, 16\)"),
        ({"target": gene, "spots": "nowhere"}, MissingKeyError, "obs_names has no 'nowhere'"),
        ({"target": gene, "spots": []}, InputError, "spots is empty"),
        ({"target": gene, "spots": spot, "method": "saliency"}, InputError, "method='saliency' is unknown"),
        ({"target": gene, "spots": spot, "baseline": "black"}, InputError, "baseline='black' is unknown"),
        ({"target": gene, "spots": spot, "n_steps": 1}, InputError, "n_steps"),
    ):
        with pytest.raises(error, match=message):
            sf.tl.attribute(one, model, **options)
    assert "attribution" not in one.obs
    assert "attribution" not in one.uns
    with pytest.raises(WrongTypeError, match="must be a model or the folder"):
        sf.tl.attribute(one, 3, target=gene, spots=spot)


class TestPlot:
    def test_draws_what_was_looked_at(self, explained: ad.AnnData):
        axes = sf.pl.attribution(explained)
        assert [ax.get_title() for ax in axes] == [
            f"section_{i}: {explained.uns['attribution']['target']}" for i in (1, 2)
        ]
        values, rings = axes[0].collections
        assert values.get_clim()[0] == -values.get_clim()[1]
        assert np.isfinite(values.get_array()).all()
        assert len(rings.get_offsets()) == 1
        whole = sf.pl.attribution(explained, library="section_1", part="image", whole=True)
        assert whole.get_title().endswith(" (tiles)")
        assert np.ptp(whole.get_xlim()) > np.ptp(axes[0].get_xlim())

    def test_guards(self, explained: ad.AnnData, tissue: ad.AnnData):
        with pytest.raises(MissingKeyError, match="there is no attribution 'attribution'; run"):
            sf.pl.attribution(tissue)
        with pytest.raises(InputError, match="part='tile' is unknown"):
            sf.pl.attribution(explained, part="tile")
        del explained.obs["attribution_gene"]
        with pytest.raises(MissingKeyError, match="the model read no counts"):
            sf.pl.attribution(explained, part="gene")
        explained.obs.loc[explained.obs["library_id"] == "section_1", "attribution"] = np.nan
        with pytest.raises(InputError, match="no spot of library 'section_1' was looked at"):
            sf.pl.attribution(explained, library="section_1")
