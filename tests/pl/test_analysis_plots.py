"""Plots: Axes in, Axes out, spots where and as large as they are, and what the titles say is true."""

from __future__ import annotations

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stfm import pl
from stfm.errors import InputError, MissingKeyError, WrongTypeError


def _tissue(name: str = "a", seed: int = 0, side: int = 8) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    x, y = (c.ravel() for c in np.meshgrid(np.arange(side), np.arange(side)))
    adata = ad.AnnData(rng.poisson(5.0, size=(side * side, 3)).astype(np.float32))
    adata.var_names = ["A", "B", "C"]
    adata.obs_names = [f"{name}{i}" for i in range(side * side)]
    adata.obsm["spatial"] = np.column_stack([x + 1, y + 1]) * 50.0
    adata.obsm["X_stfm"] = rng.normal(size=(side * side, 6)).astype(np.float32)
    adata.obs["spatial_domain"] = pd.Categorical((x >= side // 2).astype(int).astype(str))
    adata.obs["label"] = pd.Categorical(np.where(y == 0, None, np.where(x >= side // 2, "right", "left")))
    adata.obs["library_id"] = name
    adata.uns["spatial_domain_colors"] = np.array(["#000000", "#ff0000"])
    picture = rng.integers(150, 255, size=(side * 50 + 50, side * 50 + 50, 3), dtype=np.uint8)
    factors = {"tissue_hires_scalef": 1.0, "microns_per_pixel": 4.0}
    adata.uns["spatial"] = {name: {"images": {"hires": picture}, "scalefactors": factors}}
    total = adata.X.sum(axis=1, keepdims=True)
    predicted = pd.DataFrame(np.log1p(1e4 * adata.X / total), index=adata.obs_names, columns=["A", "B", "C"])
    predicted["ELSEWHERE"] = 1.0
    adata.obsm["predicted_expression"] = predicted.astype(np.float32)
    return adata


def _two() -> ad.AnnData:
    return ad.concat([_tissue("a"), _tissue("b", 1)], uns_merge="unique")


@pytest.fixture(autouse=True)
def _nothing_outside_the_axes():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def _collections(ax):
    from matplotlib.collections import EllipseCollection

    return [c for c in ax.collections if isinstance(c, EllipseCollection)]


def test_domains_are_drawn_where_they_are_with_their_colours():
    adata = _tissue()
    ax = pl.spatial_domains(adata)
    (spots,) = _collections(ax)
    np.testing.assert_allclose(spots.get_offsets(), adata.obsm["spatial"])
    assert mpl.colors.to_hex(spots.get_facecolors()[0]) == "#000000"
    assert mpl.colors.to_hex(spots.get_facecolors()[7]) == "#ff0000"
    assert spots.get_widths()[0] == pytest.approx(100 / 4)  # an ST spot of 100 µm at 4 µm/px
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1"]
    assert ax.get_aspect() == 1.0
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert "µm" in ax.texts[0].get_text()
    assert len(ax.images) == 1
    ax.figure.canvas.draw()


def test_size_image_and_legend_are_options():
    adata = _tissue()
    _, ax = plt.subplots()
    assert pl.spatial_domains(adata, size=2.0, image=False, legend=False, ax=ax) is ax
    assert _collections(ax)[0].get_widths()[0] == pytest.approx(50.0)
    assert ax.images[:] == []
    assert ax.get_legend() is None


def test_spots_without_a_label_are_grey_and_named():
    ax = pl.spatial_domains(_tissue(), "label")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["left", "right", "none"]
    assert mpl.colors.to_hex(_collections(ax)[0].get_facecolors()[0]) == "#d9d9d9"


def test_beside_the_truth_domains_take_its_colours_and_the_ari_is_said():
    truth, found = pl.spatial_domains(_tissue(), truth="label")
    assert found.get_title() == "spatial domain (ARI 1.00)"
    left, right = (_collections(ax)[0].get_facecolors()[-8:] for ax in (truth, found))
    np.testing.assert_allclose(left, right)


def test_a_panel_a_library():
    adata = _two()
    axes = pl.spatial_domains(adata, library_key="library_id")
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    assert len(_collections(axes[1])[0].get_offsets()) == 64
    alone = pl.spatial_domains(adata, library="b")
    assert alone.get_title() == "spatial domain"
    figure, given = plt.subplots(1, 2)
    assert pl.spatial_domains(adata, ax=given)[1] is given[1]
    assert plt.get_fignums()[-1] == figure.number


def test_without_coordinates_scale_there_is_no_bar():
    adata = _tissue()
    del adata.uns["spatial"]
    adata.obsm["spatial"] = np.random.default_rng(0).random((64, 2))
    ax = pl.spatial_domains(adata)
    assert list(ax.texts) == []


def test_predicted_beside_measured_with_r():
    adata = _tissue()
    axes = pl.predicted_expression(adata, "A")
    assert axes.shape == (1, 2)
    assert [ax.get_title() for ax in axes[0]] == ["A measured", "A predicted, r = 1.00"]
    measured, predicted = (_collections(ax)[0].get_array() for ax in axes[0])
    np.testing.assert_allclose(measured, predicted, rtol=1e-5)
    several = pl.predicted_expression(adata, ["A", "B"], same_scale=True, image=False)
    assert several.shape == (2, 2)
    assert _collections(several[1, 0])[0].get_clim() == _collections(several[1, 1])[0].get_clim()


def test_a_gene_that_was_not_measured_is_drawn_alone():
    ax = pl.predicted_expression(_tissue(), "ELSEWHERE")
    assert ax.get_title() == "ELSEWHERE predicted"
    ax.figure.canvas.draw()
    assert pl.predicted_expression(_two(), "B").shape == (2, 2)


@pytest.mark.parametrize("color", [None, "label", "number", "A"])
def test_embedding_by_category_number_and_gene(color: str | None):
    adata = _tissue()
    adata.obs["number"] = np.arange(64.0)
    ax = pl.embedding(adata, color)
    assert len(ax.collections[0].get_offsets()) == 64
    assert ax.get_xlabel().startswith("PC 1 (")
    assert ("label" in ax.get_title()) == (color == "label")
    ax.figure.canvas.draw()


def test_embedding_of_spots_without_a_part_are_left_out():
    adata = _tissue()
    part = adata.obsm["X_stfm"].copy()
    part[:10] = np.nan
    adata.obsm["X_stfm_image"] = part
    ax = pl.embedding(adata, part="image")
    assert len(ax.collections[0].get_offsets()) == 54
    with pytest.raises(MissingKeyError, match=r"no gene part \(it has: image\)"):
        pl.embedding(adata, part="gene")


def test_training_curves():
    epochs = np.arange(6)
    history = pd.DataFrame(
        {
            "epoch": epochs, "lr": 1e-3, "train_loss": 3.0 - epochs / 4, "val_loss": (epochs - 3.0) ** 2 + 1,
            "train_spot": 2.0, "val_spot": [np.nan, 2, np.nan, 2, 2, 2],
        }
    )  # fmt: skip
    ax = pl.training(history)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["loss, training", "loss, validation", "spot, training", "spot, validation", "best, epoch 3"]
    assert [line.get_linestyle() for line in ax.lines[:2]] == ["-", "--"]
    assert len(pl.training(history, ["spot"]).lines) == 3

    class Trained:
        pass

    model = Trained()
    model.history = history.iloc[:1]
    assert pl.training(model).lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: pl.spatial_domains(a, "domain"), MissingKeyError, "no column 'domain'"),
        (lambda a: pl.spatial_domains(a.X), WrongTypeError, "must be AnnData"),
        (lambda a: pl.spatial_domains(a, library="z"), MissingKeyError, "no library 'z'"),
        (lambda a: pl.spatial_domains(a, size=0.0), InputError, "size must be a finite number"),
        (lambda a: pl.spatial_domains(a, ["label", "label2"]), MissingKeyError, "Did you mean 'label'"),
        (lambda a: pl.spatial_domains(a, truth="label", ax=plt.gca()), InputError, "2 panels are drawn"),
        (lambda a: pl.predicted_expression(a, "D"), MissingKeyError, "'D' was not predicted"),
        (lambda a: pl.predicted_expression(a, "A", key="p"), MissingKeyError, "run stfm.tl.predict_expression"),
        (lambda a: pl.predicted_expression(a, "A", layer="c"), MissingKeyError, "no 'c'"),
        (lambda a: pl.embedding(a, key="X_pca"), MissingKeyError, "run stfm.tl.embed"),
        (lambda a: pl.embedding(a, "Z"), MissingKeyError, "neither a column of obs nor a gene"),
        (lambda a: pl.embedding(a, layout="tsne"), InputError, "layout='tsne' is unknown"),
        (lambda a: pl.training(None), InputError, "not trained"),
        (lambda a: pl.training(3), WrongTypeError, "must be a trained model"),
        (lambda a: pl.training(pd.DataFrame({"lr": [1.0]})), InputError, "no column of losses"),
        (lambda a: pl.training(pd.DataFrame({"train_loss": [1.0]}), ["spot"]), InputError, "no loss 'spot'"),
    ],
)
def test_guards(call, error: type, message: str):
    with pytest.raises(error, match=message):
        call(_tissue())


def test_readers():
    from stfm import get

    adata = _tissue()
    table = get.embedding(adata)
    assert table.shape == (64, 6)
    assert table.columns[0] == "joint_0"
    with pytest.raises(InputError, match="part='rna' is unknown"):
        get.embedding(adata, part="rna")
    with pytest.raises(WrongTypeError, match="must be AnnData"):
        get.embedding(adata.X)
    with pytest.raises(WrongTypeError, match="must be AnnData"):
        get.predicted(adata.X)
