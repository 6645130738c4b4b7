"""build_niches on AnnData: slots, units, the ecosystem, and bad input that leaves the object as it was."""

from __future__ import annotations

import contextlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import stfm as sf
from stfm._errors import InputError, MissingKeyError, StfmWarning, WrongTypeError


def make(coords: np.ndarray, n_vars: int = 5, **obs: object) -> ad.AnnData:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(2, (len(coords), n_vars)).astype(np.float32))
    names = pd.Index([f"s{i}" for i in range(len(coords))])
    return ad.AnnData(counts, obs=pd.DataFrame(obs, index=names), obsm={"spatial": coords})


def scattered(n: int = 60, dims: int = 2) -> np.ndarray:
    return np.random.default_rng(1).random((n, dims)) * 100


def hexagons(rows: int = 9, columns: int = 9, pitch: float = 137.8) -> np.ndarray:
    r, c = np.divmod(np.arange(rows * columns), columns)
    return np.round(np.column_stack([(c + 0.5 * (r % 2)) * pitch, r * pitch * np.sqrt(3) / 2]))


def untouched(adata: ad.AnnData) -> bool:
    return not adata.obsp and "niche" not in adata.uns


class TestSlots:
    def test_written(self):
        adata = make(scattered())
        assert sf.pp.build_niches(adata) is None
        connectivities, distances = adata.obsp["niche_connectivities"], adata.obsp["niche_distances"]
        assert sp.issparse(connectivities)
        assert connectivities.format == distances.format == "csr"
        assert connectivities.dtype == distances.dtype == np.float32
        assert (np.diff(connectivities.indptr) == 3).all()
        assert (connectivities.data == 1).all()
        table = sf.get.niche_table(adata)
        assert table.index.dtype == np.int32
        assert (np.diff(table.distance, axis=1) >= 0).all()
        record = adata.uns["niche"]
        assert record["connectivities_key"] == "niche_connectivities"
        assert record["distances_key"] == "niche_distances"
        assert record["params"]["n_neighbors"] == 3
        assert record["params"]["unit"] == "px"
        assert record["params"]["tie_tolerance"].tolist() == [0.0]

    def test_key_added_and_copy(self):
        adata = make(scattered())
        other = sf.pp.build_niches(adata, 6, key_added="ring", include_self=True, copy=True)
        assert untouched(adata)
        assert set(other.obsp) == {"ring_connectivities", "ring_distances"}
        table = sf.get.niche_table(other, key="ring")
        assert table.k == 7
        np.testing.assert_array_equal(table.index[:, 0], np.arange(60))

    def test_survives_disk_and_subsetting(self, tmp_path):
        adata = make(scattered(), library=["a/b", "c"] * 30)
        sf.pp.build_niches(adata, radius=30.0, ties="all", library_key="library")
        before = sf.get.niche_table(adata)
        adata.write_h5ad(tmp_path / "niches.h5ad")
        back = ad.read_h5ad(tmp_path / "niches.h5ad")
        np.testing.assert_array_equal(sf.get.niche_table(back).index, before.index)
        part = adata[adata.obs["library"] == "c"]
        np.testing.assert_array_equal(
            sf.get.niche_table(part).distance, before.distance[1::2, : sf.get.niche_table(part).k]
        )

    def test_libraries_are_apart(self):
        coords = scattered()
        library = np.array(["one", "two"] * 30)
        adata = make(np.repeat(coords[::2], 2, axis=0), library_id=library)
        sf.pp.build_niches(adata)
        table = sf.get.niche_table(adata)
        assert (library[table.index] == library[:, None]).all()
        np.testing.assert_array_equal(table.distance[::2], table.distance[1::2])

    def test_three_dimensions(self):
        adata = make(scattered(dims=3))
        sf.pp.build_niches(adata, 4)
        d = np.linalg.norm(adata.obsm["spatial"][:, None] - adata.obsm["spatial"][None], axis=2)
        np.testing.assert_allclose(sf.get.niche_table(adata).distance, np.sort(d, axis=1)[:, 1:5], rtol=1e-6)

    def test_other_spatial_key(self):
        adata = make(scattered())
        adata.obsm["X_spatial"] = adata.obsm.pop("spatial")
        sf.pp.build_niches(adata, spatial_key="X_spatial")
        assert sf.get.niche_table(adata).k == 3


class TestUnits:
    def test_micrometres_from_the_lattice(self):
        adata = make(hexagons())
        sf.pp.build_niches(adata, 6)
        params = adata.uns["niche"]["params"]
        assert params["unit"] == "um"
        assert params["mpp"][0] == pytest.approx(100 / 137.8, rel=0.005)
        inner = sf.get.niche_table(adata).distance[40]
        np.testing.assert_allclose(inner, 100, rtol=0.01)

    def test_radius_is_in_micrometres(self):
        adata = make(hexagons())
        sf.pp.build_niches(adata, None, radius=110.0)
        assert sf.get.niche_table(adata).degree[40] == 6

    def test_metadata(self):
        adata = make(scattered())
        adata.uns["spatial"] = {"lib": {"scalefactors": {"microns_per_pixel": 0.5}}}
        sf.pp.build_niches(adata, 2, tie_tolerance=0.0)
        px = sf.slide.niches.knn(adata.obsm["spatial"], 2)
        np.testing.assert_allclose(sf.get.niche_table(adata).distance, px.distance * 0.5)

    def test_one_unknown_library_keeps_pixels(self):
        adata = make(np.vstack([hexagons(), scattered(81)]), library=["hex"] * 81 + ["cells"] * 81)
        sf.pp.build_niches(adata)
        assert adata.uns["niche"]["params"]["unit"] == "px"
        assert sf.get.niche_table(adata).distance[40].min() == pytest.approx(138, abs=1)

    def test_lattice_ties_go_by_index(self):
        adata = make(hexagons())
        sf.pp.build_niches(adata)
        assert sorted(sf.get.niche_table(adata).index[40]) == [30, 31, 39]
        sf.pp.build_niches(adata, ties="all")
        assert sf.get.niche_table(adata).degree[40] == 6


@pytest.mark.slow  # scanpy and squidpy compile what they use
class TestNeighboursInTheEcosystem:
    @pytest.fixture
    def adata(self) -> ad.AnnData:
        adata = make(hexagons(), n_vars=8)
        adata.obs["cluster"] = pd.Categorical(np.where(adata.obsm["spatial"][:, 0] > 600, "right", "left"))
        sf.pp.build_niches(adata, 6)
        return adata

    def test_scanpy(self, adata):
        sc = pytest.importorskip("scanpy")
        pytest.importorskip("leidenalg", reason="leiden needs leidenalg")
        sc.tl.leiden(adata, neighbors_key="niche", flavor="igraph", n_iterations=2, directed=False)
        assert adata.obs["leiden"].nunique() > 1

    @pytest.mark.filterwarnings("ignore")
    def test_scanpy_umap(self, adata):
        sc = pytest.importorskip("scanpy")
        sc.tl.umap(adata, neighbors_key="niche", maxiter=3)
        assert adata.obsm["X_umap"].shape == (81, 2)

    @pytest.mark.filterwarnings("ignore")
    def test_squidpy(self, adata):
        sq = pytest.importorskip("squidpy", reason="squidpy is not installed")
        sq.gr.nhood_enrichment(
            adata, cluster_key="cluster", connectivity_key="niche_connectivities", seed=0, show_progress_bar=False
        )
        zscore = adata.uns["cluster_nhood_enrichment"]["zscore"]
        assert zscore[0, 0] > 0 > zscore[0, 1]
        adata.X = adata.X.toarray()
        adata.X[:, 0] = adata.obsm["spatial"][:, 0]
        sq.gr.spatial_autocorr(adata, connectivity_key="niche_connectivities", mode="moran", show_progress_bar=False)
        assert adata.uns["moranI"].loc["0", "I"] > 0.8


class TestBadInput:
    def test_no_coordinates(self):
        adata = make(scattered())
        adata.obsm["X_pca"] = adata.obsm.pop("spatial")
        with pytest.raises(MissingKeyError, match="obsm has no 'spatial'.*'X_pca'.*spatial_key="):
            sf.pp.build_niches(adata)
        assert untouched(adata)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_finite(self, bad):
        coords = scattered()
        coords[4, 1] = bad
        adata = make(coords)
        with pytest.raises(InputError, match="'s4' first.*remove them"):
            sf.pp.build_niches(adata)
        assert untouched(adata)

    def test_four_columns(self):
        adata = make(scattered(dims=4))
        with pytest.raises(InputError, match=r"\(spots, 2\) or \(spots, 3\)"):
            sf.pp.build_niches(adata)
        assert untouched(adata)

    def test_empty(self):
        adata = make(np.zeros((0, 2)))
        with pytest.raises(InputError, match="no spots"):
            sf.pp.build_niches(adata)
        assert untouched(adata)

    def test_library(self):
        adata = make(scattered(), section=["a", "b"] * 30)
        with pytest.raises(MissingKeyError, match="no column 'sections'. Did you mean 'section'"):
            sf.pp.build_niches(adata, library_key="sections")
        adata.obs.loc["s3", "section"] = None
        with pytest.raises(InputError, match="empty for 1 spots"):
            sf.pp.build_niches(adata)
        assert untouched(adata)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_neighbors": 0}, "n_neighbors must be at least 1"),
            ({"n_neighbors": None}, "pass radius="),
            ({"radius": 0}, "radius must be a finite number greater than 0"),
            ({"ties": "random"}, "ties='random' is unknown"),
            ({"key_added": ""}, "key_added is empty"),
        ],
    )
    def test_arguments(self, options, message):
        adata = make(scattered())
        with pytest.raises(InputError, match=message):
            sf.pp.build_niches(adata, **options)
        assert untouched(adata)

    def test_not_anndata(self):
        with pytest.raises(WrongTypeError, match="AnnData"):
            sf.get.niche_table(np.zeros((3, 2)))

    def test_nothing_to_read(self):
        adata = make(scattered())
        with pytest.raises(MissingKeyError, match="run stfm.pp.build_niches"):
            sf.get.niche_table(adata)
        sf.pp.build_niches(adata)
        del adata.obsp["niche_distances"]
        with pytest.raises(MissingKeyError, match="obsp has no 'niche_distances'"):
            sf.get.niche_table(adata)


class TestDefined:
    def test_view_is_made_whole_with_a_warning(self):
        adata = make(scattered())
        view = adata[:30]
        with pytest.warns(StfmWarning, match="view"):
            sf.pp.build_niches(view)
        assert not view.is_view
        assert sf.get.niche_table(view).n_obs == 30
        assert untouched(adata)

    def test_view_stays_a_view_after_an_error(self):
        view = make(scattered())[:30]
        with pytest.raises(InputError):
            sf.pp.build_niches(view, ties="never")
        assert view.is_view

    def test_backed(self, tmp_path):
        make(scattered()).write_h5ad(tmp_path / "backed.h5ad")
        adata = ad.read_h5ad(tmp_path / "backed.h5ad", backed="r")
        sf.pp.build_niches(adata)
        assert adata.isbacked
        memory = make(scattered())
        sf.pp.build_niches(memory)
        np.testing.assert_array_equal(sf.get.niche_table(adata).index, sf.get.niche_table(memory).index)
        assert not sf.pp.build_niches(adata, copy=True).isbacked
        adata.file.close()

    @pytest.mark.parametrize("n", [1, 3])
    def test_few_spots(self, n):
        adata = make(scattered(n))
        with pytest.warns(StfmWarning, match=f"no more than n_neighbors=3 spots.*{n} spots"):
            sf.pp.build_niches(adata)
        assert sf.get.niche_table(adata).degree.tolist() == [n - 1] * n

    def test_duplicates_and_isolated(self):
        coords = np.array([[0.0, 0], [0, 0], [0, 0], [1, 0], [90, 90]])
        adata = make(coords, library_id="a")
        sf.pp.build_niches(adata, 2, radius=5.0)
        table = sf.get.niche_table(adata)
        assert table.index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [-1, -1]]
        assert table.distance[0].tolist() == [0, 0]
        mean = sf.slide.niches.niche_mean(adata.X, table)
        np.testing.assert_array_equal(mean[4], adata.X[4].toarray()[0])

    def test_sections_laid_over_each_other_are_told(self):
        coords = np.concatenate([scattered(30)] * 2)
        with pytest.warns(StfmWarning, match="60 of 60 spots lie exactly on another.*library_key=") as told:
            sf.pp.build_niches(make(coords), include_self=True)
        assert len(told) == 1
        sf.pp.build_niches(make(coords, section=["a"] * 30 + ["b"] * 30))
        sf.pp.build_niches(make(coords, library_id="one"))  # said to be one library: believed

    def test_a_few_spots_at_one_place_are_rounding(self):
        coords = scattered(300)
        coords[7] = coords[8]
        adata = make(coords)
        sf.pp.build_niches(adata)  # a warning would be an error here
        assert adata.obsp["niche_distances"][7, 8] == 0.0
        assert adata.obsp["niche_connectivities"][7, 8] == 1.0

    def test_patients_are_told_apart(self):
        patients = ["P1"] * 30 + ["P2"] * 30
        with pytest.warns(StfmWarning, match=r"several patients.*'slide' \(2 patients\).*library_key="):
            sf.pp.build_niches(make(scattered(), patient=patients))
        sf.pp.build_niches(make(scattered(), patient=patients, library_id=patients))
        sf.pp.build_niches(make(scattered(), patient="P1"))
        with pytest.warns(StfmWarning, match=r"'a' \(2 patients\)"):
            sf.pp.build_niches(make(scattered(), patient=patients, library_id=["b"] * 15 + ["a"] * 45))

    @pytest.mark.parametrize("include_self", [False, True])
    def test_radius_within_which_there_is_nobody(self, include_self):
        adata = make(hexagons())
        with pytest.warns(StfmWarning, match=r"No spot has a neighbour within radius=20 µm: every niche is empty"):
            sf.pp.build_niches(adata, 6, radius=20.0, include_self=include_self)
        assert (sf.get.niche_table(adata).degree == int(include_self)).all()
        sf.pp.build_niches(adata, 6, radius=101.0, include_self=include_self)

    @pytest.mark.parametrize("n", [2, 40])
    def test_all_spots_at_one_place(self, n):
        adata = make(np.concatenate([scattered(20), np.full((n, 2), 3.5)]), section=["a"] * 20 + ["b"] * n)
        with pytest.raises(InputError, match=rf"Library 'b': all {n} spots lie at one place \(3.5, 3.5\)"):
            sf.pp.build_niches(adata, 1)
        assert untouched(adata)

    def test_same_again(self):
        adata = make(scattered())
        sf.pp.build_niches(adata, 6)
        sf.pp.build_niches(adata, 3)
        assert sf.get.niche_table(adata).k == 3


@pytest.mark.parametrize("section", ["dlpfc_151673", "her2st_G2"])
def test_real_slides(shared_data, section):
    adata = ad.read_h5ad(shared_data / "h5ad" / f"{section}.h5ad", backed="r")
    coords = np.asarray(adata.obsm["spatial"])
    slim = ad.AnnData(obs=adata.obs[[]].copy(), obsm={"spatial": coords})
    adata.file.close()
    with pytest.warns(StfmWarning) if section.startswith("her2st") else contextlib.nullcontext():
        sf.pp.build_niches(slim, 3)
    params = slim.uns["niche"]["params"]
    assert params["unit"] == "um"
    table = sf.get.niche_table(slim)
    if section.startswith("dlpfc"):  # a Visium lattice in whole pixels
        assert params["tie_tolerance"][0] == pytest.approx(5, abs=0.1)
        np.testing.assert_allclose(np.median(table.distance), 100, rtol=0.01)
    else:  # measured positions of an ST array: no two distances tie
        assert params["tie_tolerance"][0] == 0
        np.testing.assert_allclose(np.median(table.distance), 200, rtol=0.05)
