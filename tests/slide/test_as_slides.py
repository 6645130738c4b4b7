from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from stfm._errors import InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.slide import Slide, as_slides
from stfm.slide.from_anndata import target

MPP = 0.5


def hex_lattice(rows: int = 6, columns: int = 7, pitch: float = 100 / MPP) -> np.ndarray:
    """Centres of a Visium-like lattice in px, a margin of two pitches around it."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    x = (column + 0.5 * (row % 2)) * pitch
    return np.column_stack([x, row * pitch * np.sqrt(3) / 2]) + 2 * pitch


def visium(name: str = "lib", *, seed: int = 0, image: bool = True) -> AnnData:
    rng = np.random.default_rng(seed)
    xy = hex_lattice()
    counts = sparse.csr_matrix(rng.poisson(1.0, (len(xy), 12)).astype(np.float32))
    adata = AnnData(
        counts,
        obs=pd.DataFrame({"patient": "P1", "library_id": name}, index=[f"{name}_{i}" for i in range(len(xy))]),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(12)]),
        obsm={"spatial": xy},
    )
    if image:
        side = int(xy.max() + 400) // 10
        picture = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        factors = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 55 / MPP}
        adata.uns["spatial"] = {name: {"images": {"hires": picture}, "scalefactors": factors}}
    return adata


def two_libraries(*, second_image: bool = True) -> AnnData:
    import anndata as ad

    both = ad.concat([visium("a"), visium("b", seed=1)])
    parts = [visium("a"), visium("b", seed=1, image=second_image)]
    both.uns["spatial"] = {k: v for part in parts for k, v in part.uns.get("spatial", {}).items()}
    both.obs["patient"] = np.repeat(["P1", "P2"], both.n_obs // 2)
    # Interleaved, so that positions within a library differ from positions in the object.
    return both[np.random.default_rng(0).permutation(both.n_obs)].copy()


def test_a_visium_slide_is_in_micrometres():
    adata = visium()
    (slide,) = as_slides(adata)
    assert slide.mpp == pytest.approx(MPP, rel=1e-3)
    assert slide.unit == "um"
    np.testing.assert_allclose(slide.coords, adata.obsm["spatial"] * slide.mpp)
    assert (slide.platform, slide.spot_um, slide.pitch_um, slide.niche_um) == ("Visium", 55, 100, 255)
    assert slide.patient == "P1"
    assert slide.counts is not None
    np.testing.assert_array_equal(slide.counts.to_csr().toarray(), adata.X.toarray())


def test_libraries_keep_their_rows():
    adata = two_libraries()
    slides = as_slides(adata)
    assert sorted(s.name for s in slides) == ["a", "b"]
    for slide in slides:
        np.testing.assert_array_equal(slide.obs_names, adata.obs_names[slide.rows])
        np.testing.assert_array_equal(slide.counts.to_csr().toarray(), adata.X[slide.rows].toarray())
    assert {s.patient for s in slides} == {"P1", "P2"}


def test_a_slide_without_an_image_has_no_tiles():
    tiles = {s.name: s.tiles for s in as_slides(two_libraries(second_image=False))}
    assert tiles["a"] is not None
    assert tiles["b"] is None


def test_subset_and_without():
    (slide,) = as_slides(visium())
    part = slide.subset([3, 1])
    assert part.n_obs == 2
    assert part.obs_names.tolist() == ["lib_3", "lib_1"]
    np.testing.assert_array_equal(part.counts.to_csr().toarray(), slide.counts.to_csr()[[3, 1]].toarray())
    assert slide.without("image").tiles is None
    assert slide.without("gene").counts is None
    with pytest.raises(MissingKeyError, match="'image' and 'gene'"):
        slide.without("protein")


def test_a_niche_table_is_read_back_by_library():
    import stfm as sf

    adata = two_libraries()
    sf.pp.build_niches(adata, n_neighbors=4)
    for slide in as_slides(adata):
        fresh = slide.with_niches(4).niches
        np.testing.assert_array_equal(slide.niches.index, fresh.index)
        np.testing.assert_allclose(slide.niches.distance, fresh.distance, rtol=1e-5)


def test_a_backed_object_is_read_by_rows(tmp_path):
    adata = two_libraries()
    adata.write_h5ad(tmp_path / "a.h5ad")
    for backed, whole in zip(as_slides(tmp_path / "a.h5ad"), as_slides(adata), strict=True):
        assert backed.counts.is_backed
        np.testing.assert_array_equal(backed.counts.rows([5, 0, 5]).toarray(), whole.counts.rows([5, 0, 5]).toarray())
        np.testing.assert_allclose(backed.counts.totals(), whole.counts.totals())


def test_lists_of_unnamed_objects_are_numbered():
    bare = AnnData(np.ones((3, 2), np.float32), obsm={"spatial": np.eye(3)[:, :2]})
    assert [s.name for s in as_slides([bare, bare.copy()])] == ["slide_0", "slide_1"]
    with pytest.raises(InputError, match="Two slides are named 'lib'"):
        as_slides([visium(), visium()])


def test_slides_pass_through():
    (slide,) = as_slides(visium())
    assert as_slides(slide) == [slide]
    assert isinstance(slide, Slide)


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (lambda a: a.obsm.pop("spatial"), {}, MissingKeyError, "no 'spatial'.*spatial_key="),
        (lambda a: a.obsm.__setitem__("spatial", np.full((a.n_obs, 2), np.nan)), {}, InputError, "nan or infinite"),
        (lambda a: a.obsm.__setitem__("spatial", np.zeros((a.n_obs, 4))), {}, InputError, r"\(spots, 2\)"),
        (lambda a: None, {"library_key": "libary_id"}, MissingKeyError, "Did you mean 'library_id'"),
        (lambda a: None, {"layer": "counts"}, MissingKeyError, "layers has no 'counts'"),
        (lambda a: None, {"patient_key": "donor"}, MissingKeyError, "no column 'donor'"),
        (lambda a: setattr(a, "X", a.X * 0.5), {}, InputError, "layer="),
        (lambda a: setattr(a, "X", -a.X), {}, InputError, "negative"),
        (lambda a: a.uns["spatial"]["lib"]["scalefactors"].pop("tissue_hires_scalef"), {}, MissingKeyError, "scalef"),
        (lambda a: a.obs.__setitem__("patient", np.arange(a.n_obs)), {}, InputError, "within one library"),
        (lambda a: a.obs.pop("library_id"), {}, None, ""),
        (lambda a: a.obs.__setitem__("library_id", [None] * a.n_obs), {}, InputError, "every spot needs a library"),
    ],
)
def test_bad_input_is_refused_and_left_alone(change, options, error, words):
    adata = visium()
    change(adata)
    before = {"uns": sorted(adata.uns), "obsm": sorted(adata.obsm), "obsp": sorted(adata.obsp)}
    if error is None:
        assert as_slides(adata, **options)[0].name == "lib"
    else:
        with pytest.raises(error, match=words):
            as_slides(adata, **options)
    assert before == {"uns": sorted(adata.uns), "obsm": sorted(adata.obsm), "obsp": sorted(adata.obsp)}


def test_two_libraries_without_a_column_are_refused():
    adata = two_libraries()
    del adata.obs["library_id"]
    with pytest.raises(MissingKeyError, match="2 libraries.*library_key="):
        as_slides(adata)


def test_an_image_without_a_scale_is_refused():
    rng = np.random.default_rng(0)
    adata = AnnData(np.ones((30, 3), np.float32), obsm={"spatial": rng.uniform(50, 450, (30, 2))})
    picture = np.full((500, 500, 3), 200, np.uint8)
    with pytest.raises(InputError, match="mpp="):
        as_slides(adata, image=picture)
    (slide,) = as_slides(adata, image=picture, mpp=2.0)
    assert slide.mpp == 2.0


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (3, WrongTypeError, "got int"),
        ([], InputError, "empty"),
        ("nowhere.h5ad", MissingKeyError, "does not exist"),
    ],
)
def test_what_is_no_slide_is_refused(data, error, words):
    with pytest.raises(error, match=words):
        as_slides(data)


def test_an_empty_object_is_refused():
    with pytest.raises(InputError, match="no spots"):
        as_slides(visium()[:0].copy())


def test_target_actualises_a_view_with_a_warning():
    view = visium()[:5]
    with pytest.warns(StfmWarning, match="view"):
        same = target(view, copy=False)
    assert same is view
    assert not view.is_view
    assert target(view, copy=True) is not view
    with pytest.raises(WrongTypeError, match="must be AnnData"):
        target(np.zeros(3), copy=False)


def test_a_view_of_a_backed_object_is_refused_before_any_warning(tmp_path):
    import anndata as ad

    import stfm as sf

    visium().write_h5ad(tmp_path / "a.h5ad")
    view = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")[:20]
    with pytest.raises(InputError, match="to_memory"):
        sf.pp.build_niches(view)


@pytest.mark.parametrize("wrong", [3, type("SpatialData", (), {})()])
def test_what_is_no_table_is_refused(wrong):
    import stfm as sf

    with pytest.raises(WrongTypeError, match="must be AnnData"):
        sf.pp.build_niches(wrong)


def test_coordinates_that_are_no_numbers_are_refused():
    import stfm as sf

    adata = visium()
    adata.obsm["spatial"] = np.full((adata.n_obs, 2), "left")
    with pytest.raises(InputError, match="does not hold numbers"):
        sf.pp.build_niches(adata)
