"""The simulated tissue: what it promises to hold, and that picture and counts tell of the same cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial import cKDTree

import stfm as sf
from stfm.errors import InputError, WrongTypeError

DOMAINS = {"tumor", "tumor_hypoxic", "glands", "stroma", "sclerosis", "lymphoid", "adipose"}


@pytest.fixture(scope="module")
def tissue() -> ad.AnnData:
    return sf.datasets.toy(n_spots=400, mpp=2.0, rng=1)


@pytest.fixture(scope="module")
def picture(tissue) -> np.ndarray:
    return tissue.uns["spatial"]["section_1"]["images"]["hires"]


def _mean_colour(picture, xy, half=6):
    return np.array(
        [picture[int(y) - half : int(y) + half, int(x) - half : int(x) + half].mean(axis=(0, 1)) for x, y in xy]
    )


def test_slots(tissue, picture):
    assert tissue.shape == (400, 600)
    assert sparse.isspmatrix_csr(tissue.X)
    assert tissue.X.dtype == np.float32
    assert (tissue.X.data == np.rint(tissue.X.data)).all()
    assert tissue.obs_names.is_unique
    assert tissue.var_names.is_unique
    assert {"ERBB2", "COL1A1", "CD3E", "MS4A1", "ADIPOQ", "ACTB"} <= set(tissue.var_names)
    assert set(tissue.obs["domain"].cat.categories) == DOMAINS
    assert (tissue.obs["domain"].value_counts() > 8).all()
    fractions = tissue.obsm["cell_type_fractions"]
    np.testing.assert_allclose(fractions.sum(axis=1), 1.0)
    np.testing.assert_allclose(tissue.varm["cell_type_profiles"].sum(axis=0), 1.0)
    assert list(tissue.obsm["programme_levels"]) == ["hypoxia", "interferon", "stress", "cycle"]
    assert tissue.var["image_linked"].dtype == bool
    assert not tissue.var["image_linked"][tissue.var["driver"].isin(["hypoxia", "interferon", "filler"])].any()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3


def test_lattice_scale_and_picture_agree(tissue, picture):
    xy = tissue.obsm["spatial"]
    factors = tissue.uns["spatial"]["section_1"]["scalefactors"]
    nearest = cKDTree(xy).query(xy, k=2)[0][:, 1]
    assert np.median(nearest) * factors["microns_per_pixel"] == pytest.approx(100.0)
    assert factors["spot_diameter_fullres"] * factors["microns_per_pixel"] == pytest.approx(55.0)
    assert (xy > 0).all()
    assert (xy < picture.shape[1::-1]).all()
    assert ((tissue.obs["array_row"] + tissue.obs["array_col"]) % 2 == 0).all()
    (slide,) = sf.slide.as_slides(tissue)
    assert slide.mpp == pytest.approx(2.0)
    assert slide.spot_um == pytest.approx(55.0)
    assert slide.patient == "patient_1"
    assert slide.panel.species == "human"


def test_picture_looks_stained(tissue, picture):
    colour = _mean_colour(picture, tissue.obsm["spatial"])
    by_domain = pd.DataFrame(colour, columns=list("rgb")).groupby(tissue.obs["domain"].to_numpy()).mean()
    assert (picture[:10].mean(axis=(0, 1)) > 230).all()  # the border is bare glass
    pink = by_domain.loc["sclerosis"]
    blue = by_domain.loc["lymphoid"]
    assert pink["r"] > pink["b"] > pink["g"]
    assert blue["b"] > blue["r"]
    assert by_domain.loc["adipose"].mean() > by_domain.drop("adipose").mean(axis=1).max()


def test_picture_and_genes_share_their_cells(tissue, picture):
    """Nuclear density is seen in red light; so are lymphocytes, and their genes must follow."""
    dark = 255 - _mean_colour(picture, tissue.obsm["spatial"])[:, 0]
    total = np.asarray(tissue.X.sum(axis=1)).ravel()
    lymphoid = tissue[:, tissue.var["driver"].isin(["T cell", "B cell"])].X.sum(axis=1).A1 / total
    fat = tissue[:, tissue.var["driver"] == "adipocyte"].X.sum(axis=1).A1 / total
    assert np.corrcoef(dark, lymphoid)[0, 1] > 0.2  # nuclei of tumours are dark as well
    assert np.corrcoef(dark, fat)[0, 1] < -0.4


def test_genes_follow_the_cells(tissue):
    total = np.asarray(tissue.X.sum(axis=1)).ravel()
    for cell_type in ("tumor", "epithelium", "fibroblast", "T cell", "adipocyte"):
        markers = tissue[:, tissue.var["driver"] == cell_type].X.sum(axis=1).A1 / total
        r = np.corrcoef(markers, tissue.obsm["cell_type_fractions"][cell_type])[0, 1]
        assert r > 0.6, cell_type
    hypoxia = tissue[:, tissue.var["driver"] == "hypoxia"].X.sum(axis=1).A1 / total
    domain = tissue.obs["domain"]
    assert hypoxia[domain == "tumor_hypoxic"].mean() > 1.6 * hypoxia[domain == "tumor"].mean()
    assert 1200 < total.mean() < 5000


def test_same_seed_same_tissue():
    one, two, three = (sf.datasets.toy(n_spots=30, mpp=4.0, rng=seed) for seed in (5, 5, 6))
    assert (one.X != two.X).nnz == 0
    picture = [a.uns["spatial"]["section_1"]["images"]["hires"] for a in (one, two)]
    np.testing.assert_array_equal(*picture)
    assert (one.X != three.X).nnz > 0
    generator = np.random.default_rng(5)
    assert (sf.datasets.toy(n_spots=30, image=False, rng=generator).X != one.X).nnz == 0


@pytest.mark.parametrize(("layout", "pitch", "depth"), [("visium", 100, 2500), ("st", 200, 4000)])
def test_layouts(layout, pitch, depth):
    adata = sf.datasets.toy(n_spots=80, layout=layout, image=False, batch_effect=0.0)
    assert adata.n_obs == 80
    nearest = cKDTree(adata.obsm["spatial"]).query(adata.obsm["spatial"], k=2)[0][:, 1]
    assert np.median(nearest) == pytest.approx(pitch)
    assert adata.X.sum() / 80 == pytest.approx(depth, rel=0.35)
    assert "images" not in adata.uns["spatial"]["section_1"]


def test_single_cells():
    adata = sf.datasets.toy(n_spots=900, layout="cells", mpp=0.5, rng=2)
    assert adata.n_obs == 900
    assert (adata.obs["n_cells"] == 1).all()
    assert (adata.obsm["cell_type_fractions"].to_numpy().max(axis=1) == 1).all()
    assert adata.obs["cell_type"].nunique() >= 8
    assert adata.obs_names.is_unique
    picture = adata.uns["spatial"]["section_1"]["images"]["hires"]
    xy = adata.obsm["spatial"]  # µm
    assert (xy * 2 < picture.shape[1::-1]).all()
    assert np.ptp(xy[:, 0]) * 2 > picture.shape[1] - 4 * 125 * 2
    (slide,) = sf.slide.as_slides(adata)
    assert (slide.mpp, slide.platform) == (1.0, "Xenium")
    nuclei = slide.tiles.read(np.arange(900), size_um=6.0, size_px=6)
    around = slide.tiles.read(np.arange(900), size_um=40.0, size_px=40)
    assert nuclei[..., 0].mean() < around[..., 0].mean() - 25  # every cell sits on its nucleus


@pytest.mark.parametrize("n_spots", [1, 2, 7])
@pytest.mark.parametrize("layout", ["visium", "st", "cells"])
def test_tiny_tissues(n_spots, layout):
    adata = sf.datasets.toy(n_spots=n_spots, layout=layout, mpp=4.0)
    assert adata.n_obs == n_spots
    assert np.isfinite(adata.obsm["cell_type_fractions"].to_numpy()).all()


def test_patients_and_sections():
    adata = sf.datasets.toy(n_spots=60, n_patients=2, n_sections=4, mpp=4.0, rng=3)
    table = adata.obs.groupby("library_id", observed=True)["patient"].unique().map(list)
    assert table.tolist() == [["patient_1"], ["patient_2"], ["patient_1"], ["patient_2"]]
    assert list(adata.uns["spatial"]) == list(adata.obs["library_id"].cat.categories)
    assert len(sf.slide.as_slides(adata)) == 4
    profile = np.log(np.stack([adata[adata.obs["library_id"] == f"section_{i}"].X.mean(axis=0).A1 for i in (1, 2, 3)]))
    common = np.isfinite(profile).all(axis=0) & (adata.X.mean(axis=0).A1 > 2)
    spread = [np.std((profile[0] - profile[i])[common]) for i in (1, 2)]
    assert spread[0] > spread[1]  # another patient is further away than another section of the same


def test_batch_effect_and_stain_can_be_switched_off():
    plain = sf.datasets.toy(n_spots=40, n_patients=2, mpp=4.0, batch_effect=0.0, stain_shift=0.0)
    glass = [plain.uns["spatial"][name]["images"]["hires"][:5].mean(axis=(0, 1)) for name in ("section_1", "section_2")]
    np.testing.assert_allclose(*glass, atol=0.3)


def test_file_round_trip(tmp_path):
    adata = sf.datasets.toy(n_spots=20, n_patients=2, mpp=8.0)
    adata.write_h5ad(tmp_path / "toy.h5ad")
    back = ad.read_h5ad(tmp_path / "toy.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert back.uns["stfm_toy"]["layout"] == "visium"
    pd.testing.assert_frame_equal(back.obsm["cell_type_fractions"], adata.obsm["cell_type_fractions"])


def test_number_of_genes():
    assert sf.datasets.toy(n_spots=5, n_genes=900, image=False).n_vars == 900
    with pytest.raises(InputError, match="n_genes must lie between"):
        sf.datasets.toy(n_genes=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "hexagon"}, "layout='hexagon' is unknown"),
        ({"as_": "mudata"}, "as_='mudata' is unknown"),
        ({"n_spots": 0}, "n_spots must be at least 1"),
        ({"n_patients": 3, "n_sections": 2}, "fewer than n_patients=3"),
        ({"mpp": -1.0}, "mpp must be a finite number greater than 0"),
        ({"mpp": 100.0}, "mpp must lie between"),
        ({"depth": 0.0}, "depth must be"),
        ({"batch_effect": -1.0}, "batch_effect must lie between"),
        ({"stain_shift": 50.0}, "stain_shift must lie between"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        sf.datasets.toy(**arguments)


def test_n_spots_must_be_a_whole_number():
    with pytest.raises(WrongTypeError, match="n_spots must be an integer"):
        sf.datasets.toy(n_spots=10.5)


@pytest.mark.slow
def test_spatialdata():
    pytest.importorskip("spatialdata")
    sdata = sf.datasets.toy(n_spots=20, n_patients=2, mpp=4.0, as_="spatialdata")
    assert set(sdata.images) == {"section_1_image", "section_2_image"}
    assert set(sdata.shapes) == {"section_1_spots", "section_2_spots"}
    table = sdata.tables["table"]
    assert table.n_obs == 40
    assert "images" not in table.uns["spatial"]["section_1"]
    picture = sdata.images["section_1_image"].to_numpy()
    assert picture.shape[0] == 3
    plain = sf.datasets.toy(n_spots=20, n_patients=2, mpp=4.0)
    np.testing.assert_array_equal(picture.transpose(1, 2, 0), plain.uns["spatial"]["section_1"]["images"]["hires"])
    assert len(sdata.shapes["section_2_spots"]) == 20
