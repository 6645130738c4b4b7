"""SpatialData gives the slides that the same AnnData gives, and its table gets the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

import stfm as sf
from stfm.errors import InputError, MissingKeyError
from stfm.slide import as_slides

spatialdata = pytest.importorskip("spatialdata")
transformations = pytest.importorskip("spatialdata.transformations")
models = pytest.importorskip("spatialdata.models")

pytestmark = pytest.mark.slow  # the package alone takes seconds to import
TOY: dict[str, Any] = {"n_spots": 40, "n_patients": 2, "mpp": 2.0}
MPP = 2.0


@pytest.fixture
def plain() -> ad.AnnData:
    return sf.datasets.toy(**TOY)


@pytest.fixture
def sdata():
    return sf.datasets.toy(**TOY, as_="spatialdata")


def same_tiles(one, other) -> bool:
    """At the resolution of the image nothing is averaged: equal to the last bit."""
    rows = np.arange(one.n_obs)
    left, right = (slide.tiles.read(rows, size_um=40 * MPP, size_px=40) for slide in (one, other))
    return np.array_equal(left, right)


def moved(sdata, matrix: list[list[float]]):
    """The same object with the first section's spots elsewhere, and a map that leads them back."""
    affine = transformations.Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
    shapes = sdata.shapes["section_1_spots"]
    linear, shift = np.array(matrix)[:2, :2], np.array(matrix)[:2, 2]
    there = np.column_stack([shapes.geometry.x, shapes.geometry.y])
    away = (there - shift) @ np.linalg.inv(linear).T
    radius = shapes["radius"].iloc[0]
    sdata.shapes["section_1_spots"] = models.ShapesModel.parse(
        away, geometry=0, radius=radius, index=shapes.index, transformations={"section_1": affine}
    )
    return sdata


def test_the_slides_are_those_of_the_anndata(plain: ad.AnnData, sdata):
    for one, other in zip(as_slides(plain), as_slides(sdata), strict=True):
        assert (one.name, one.mpp, one.platform, one.patient) == (other.name, other.mpp, other.platform, other.patient)
        np.testing.assert_allclose(one.coords, other.coords)
        np.testing.assert_array_equal(one.obs_names, other.obs_names)
        np.testing.assert_array_equal(one.counts.rows([0, 3]).toarray(), other.counts.rows([0, 3]).toarray())
        assert same_tiles(one, other)
    assert [slide.tiles for slide in as_slides(sdata, modalities=("gene",))] == [None, None]


@pytest.mark.parametrize(
    "matrix",
    [
        [[1.0, 0, 30], [0, 1, -20], [0, 0, 1]],  # moved
        [[0.0, -1, 500], [1, 0, 0], [0, 0, 1]],  # turned
        [[0.25, 0, 0], [0, 0.25, 0], [0, 0, 1]],  # the image is a small copy of the full one
    ],
)
def test_spots_are_laid_over_the_image(plain: ad.AnnData, sdata, matrix):
    small = matrix[0][0] == 0.25
    if small:  # a px of the full image is smaller then
        sdata.tables["table"].uns["spatial"] = {}
    slide = as_slides(moved(sdata, matrix))[0]
    assert slide.mpp == pytest.approx(MPP / 4 if small else MPP, rel=1e-3)
    assert slide.tiles.image_scale == pytest.approx(0.25 if small else 1.0)
    assert same_tiles(as_slides(plain)[0], slide)


def test_as_visium_is_read_elsewhere(plain: ad.AnnData):
    """Elements named and mapped as spatialdata-io does: two images of a section, the finer one with several levels."""
    plain = plain[plain.obs["library_id"] == "section_1"].copy()
    picture = plain.uns["spatial"]["section_1"]["images"]["hires"]
    scale, same = transformations.Scale, transformations.Identity()
    spots = {"global": same, "s_downscaled_hires": scale([0.5, 0.5], axes=("x", "y"))}
    where = {"s_downscaled_hires": same, "global": scale([2.0, 2.0], axes=("x", "y"))}
    options = {"dims": ("y", "x", "c"), "c_coords": ("r", "g", "b")}
    images = {
        "s_hires_image": models.Image2DModel.parse(picture[::2, ::2], transformations=where, **options),
        "s_full_image": models.Image2DModel.parse(
            picture, transformations={"global": same}, scale_factors=[2], **options
        ),
    }
    shapes = models.ShapesModel.parse(plain.obsm["spatial"], geometry=0, radius=27.5 / MPP, transformations=spots)
    own = ad.AnnData(plain.X, obs=plain.obs[["array_row", "array_col"]].assign(region="s", spot=np.arange(40)))
    own.var_names, own.obs["region"] = plain.var_names, "s"
    own.obs["region"] = own.obs["region"].astype("category")
    table = models.TableModel.parse(own, region="s", region_key="region", instance_key="spot")
    sdata = spatialdata.SpatialData(images=images, shapes={"s": shapes}, tables={"table": table})
    (slide,) = as_slides(sdata)
    assert (slide.name, slide.mpp, slide.platform) == ("s", pytest.approx(MPP, rel=1e-3), "Visium")
    assert same_tiles(as_slides(plain)[0], slide)
    del sdata.images["s_full_image"]
    assert as_slides(sdata)[0].tiles.image_scale == 0.5


def test_results_are_written_to_the_table(plain: ad.AnnData, sdata):
    table = sdata.tables["table"]
    places = table.obsm["spatial"].copy()
    for data in (plain, sdata):
        assert sf.pp.build_niches(data, 6) is None
        sf.pp.tile(data)
    model = sf.tl.train(sdata, "st-align-tiny", epochs=1)
    assert sorted(model.seen.patients) == ["patient_1", "patient_2"]
    for data in (plain, sdata):
        sf.tl.embed(data, model)
        sf.tl.spatial_domains(data, 3)
    assert (plain.obsp["niche_distances"] != table.obsp["niche_distances"]).nnz == 0
    record = table.uns["stfm"]["tiles"]["section_2"]
    assert (record["image"], record["platform"], record["mpp_source"]) == ("file", "Visium", "pitch")
    np.testing.assert_allclose(plain.obsm["X_stfm"], table.obsm["X_stfm"], atol=1e-2)  # tiles of a pyramid
    assert set(table.obs["spatial_domain"].cat.categories) == {"0", "1", "2"}
    assert len(table.uns["spatial_domain_colors"]) == 3
    np.testing.assert_array_equal(table.obsm["spatial"], places)
    assert "images" not in table.uns["spatial"]["section_1"]


def test_a_copy_shares_all_but_the_table(plain: ad.AnnData, sdata):
    plain.obs["patient"] = plain.obs["patient"].astype(str) + " of another study"
    plain.obs["library_id"] = plain.obs["library_id"].astype(str) + " too"
    plain.uns["spatial"] = {f"{name} too": entry for name, entry in plain.uns["spatial"].items()}
    options = {"genes": ["ERBB2"], "rings": 0, "tile_px": 32, "contexts_um": (112.0,), "cache": False}
    other = sf.tl.predict_expression(sdata, reference=plain, copy=True, **options)
    assert isinstance(other, spatialdata.SpatialData)
    assert other.tables["table"].obsm["predicted_expression"].columns.tolist() == ["ERBB2"]
    assert "predicted_expression" not in sdata.tables["table"].obsm
    assert other.shapes["section_1_spots"] is sdata.shapes["section_1_spots"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # while it writes
def test_from_disk(plain: ad.AnnData, sdata, tmp_path: Path):
    sdata.write(tmp_path / "s.zarr")
    read = spatialdata.read_zarr(tmp_path / "s.zarr")
    slides = as_slides(read)
    assert slides[0].tiles.source.name.startswith(str(tmp_path))  # read where it is, not loaded
    assert all(same_tiles(one, other) for one, other in zip(as_slides(plain), slides, strict=True))


def test_regions_are_libraries_where_nothing_else_names_them(sdata):
    table = sdata.tables["table"]
    del table.obs["library_id"]
    sf.pp.build_niches(sdata)
    assert table.uns["niche"]["params"]["libraries"].tolist() == ["section_1_spots", "section_2_spots"]
    assert "library_id" not in table.obs
    assert [slide.name for slide in as_slides(sdata)] == ["section_1_spots", "section_2_spots"]


def _two_tables(sdata) -> None:
    sdata.tables["other"] = ad.AnnData(np.ones((2, 2), np.float32))


def _no_annotation(sdata) -> None:
    del sdata.tables["table"].uns["spatialdata_attrs"]


def _two_images(sdata) -> None:
    sdata.images["section_1_other"] = sdata.images["section_1_image"]


def _stretched(sdata) -> None:
    moved(sdata, [[1.0, 0, 0], [0, 2, 0], [0, 0, 1]])


def _lost_shapes(sdata) -> None:
    sdata.shapes["section_1_spots"] = sdata.shapes["section_1_spots"].iloc[5:]


@pytest.mark.filterwarnings("ignore::UserWarning:spatialdata")
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_two_tables, InputError, r"must have one table to be read, this one has 'other', 'table'|'table', 'other'"),
        (_no_annotation, MissingKeyError, "annotates no element"),
        (_two_images, InputError, "Library 'section_1' has 2 images"),
        (_stretched, InputError, "is stretched or sheared"),
        (_lost_shapes, MissingKeyError, r"5 rows of the table have no shape in 'section_1_spots' \(instance 0 first\)"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(sdata, spoil, error, message: str):
    spoil(sdata)
    slots = [*sdata.tables["table"].obsm, *sdata.tables["table"].uns]
    with pytest.raises(error, match=message):
        sf.pp.tile(sdata)
    assert [*sdata.tables["table"].obsm, *sdata.tables["table"].uns] == slots


def test_an_error_leaves_the_object_untouched(sdata):
    table = sdata.tables["table"]
    slots = [*table.obsm, *table.uns, *table.obsp, *table.obs]
    with pytest.raises(InputError, match="ties='never'"):
        sf.pp.build_niches(sdata, ties="never")
    with pytest.raises(MissingKeyError, match="nothing"):
        sf.tl.embed(sdata, library_key="nothing")
    assert [*table.obsm, *table.uns, *table.obsp, *table.obs] == slots
