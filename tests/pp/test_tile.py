"""``pp.tile``: what it records, and every bad input with the object untouched."""

from __future__ import annotations

import warnings
from copy import deepcopy

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

import stfm as sf
from stfm._settings import settings
from stfm.errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.pp._tissue import exchanged_on_array, otsu, tissue_mask
from stfm.slide import as_slides

MPP = 0.5
FACTOR = 0.25


def tissue(height: int = 240, width: int = 400) -> np.ndarray:
    """White glass with a coloured piece of tissue in its lower left part."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), 245, np.uint8)
    stain = np.array([180, 90, 160]) + rng.integers(-30, 30, (height, width, 1))
    image[height // 3 :, : width // 2] = stain[height // 3 :, : width // 2]
    return image


def visium(*, diameter_px: float | None = 55 / MPP, library: str = "s1") -> ad.AnnData:
    """A slide as scanpy reads it: coordinates of the full-resolution image, a picture at a quarter of it."""
    rng = np.random.default_rng(1)
    y = np.arange(4).repeat(4)
    x = np.tile(np.arange(4), 4)
    xy = np.stack([60 + (x + 0.5 * (y % 2)) * 200, 330 + y * 100 * np.sqrt(3)], axis=1)
    counts = sparse.csr_matrix(rng.poisson(2, (len(xy), 5)).astype(np.float32))
    adata = ad.AnnData(counts, obs=pd.DataFrame(index=[f"b{i}" for i in range(len(xy))]))
    adata.obsm["spatial"] = xy
    factors = {"tissue_hires_scalef": FACTOR, "tissue_lowres_scalef": FACTOR / 2}
    if diameter_px is not None:
        factors["spot_diameter_fullres"] = diameter_px
    images = {"hires": tissue(), "lowres": tissue(120, 200)}
    adata.uns["spatial"] = {library: {"images": images, "scalefactors": factors}}
    return adata


def untouched(adata: ad.AnnData):
    """Return a function that checks that nothing was written since."""
    before = deepcopy(adata.uns)
    slots = (list(adata.obsm), list(adata.obs), list(adata.layers), adata.is_view)

    def check() -> None:
        assert list(adata.uns) == list(before)
        assert "stfm" not in adata.uns
        assert (list(adata.obsm), list(adata.obs), list(adata.layers), adata.is_view) == slots

    return check


@pytest.fixture(autouse=True)
def _own_cache(tmp_path):
    with settings.override(cache_dir=tmp_path / "cache"):
        yield


def recorded(adata: ad.AnnData, library: str = "s1") -> dict:
    return adata.uns["stfm"]["tiles"][library]


def test_record_of_a_visium_slide():
    adata = visium()
    before = set(adata.uns)
    assert sf.pp.tile(adata) is None
    record = recorded(adata)
    assert set(adata.uns) == before | {"stfm"}
    assert record["mpp"] == pytest.approx(MPP)
    assert record["native_mpp"] == pytest.approx(MPP / FACTOR)
    assert (record["image"], record["image_key"], record["platform"]) == ("uns", "hires", "Visium")
    assert (record["spot_um"], record["spot_px"], record["niche_um"], record["niche_px"]) == (55.0, 28, 255.0, 224)
    assert record["n_tiles"] == adata.n_obs
    assert record["image_shape"].tolist() == [240, 400]
    slide = as_slides(adata)[0]
    assert record["n_niche_padded"] == slide.tiles.padded(255.0).sum() > 0
    assert record["n_spot_padded"] == slide.tiles.padded(55.0).sum()


def test_no_pixels_are_kept_and_h5ad_holds_it(tmp_path):
    adata = visium()
    sf.pp.tile(adata)
    assert sum(np.asarray(v).nbytes for v in recorded(adata).values()) < 5000
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    tiles = as_slides(adata)[0].tiles
    np.testing.assert_array_equal(
        as_slides(again)[0].tiles.read([3, 1], size_um=255, size_px=56), tiles.read([3, 1], size_um=255, size_px=56)
    )


def test_sizes_and_scale_are_the_callers():
    adata = visium()
    with pytest.warns(StfmWarning, match="by mpp="):
        sf.pp.tile(adata, mpp=1.0, spot_um=80, niche_um=300, spot_px=32, niche_px=96, image_key="lowres")
    record = recorded(adata)
    assert (record["mpp"], record["mpp_source"], record["image_key"]) == (1.0, "argument", "lowres")
    assert [record[k] for k in ("spot_um", "niche_um", "spot_px", "niche_px")] == [80, 300, 32, 96]
    slide = as_slides(adata)[0]
    assert (slide.spot_um, slide.niche_um, slide.mpp) == (80, 300, 1.0)
    assert slide.tiles.source.shape == (120, 200)


@pytest.mark.parametrize("kind", ["array", "path", "zarr", "pillow"])
def test_images_of_every_kind_are_found_again(tmp_path, kind):
    import zarr

    adata = visium()
    del adata.uns["spatial"]["s1"]["images"]
    picture = tissue()
    path = tmp_path / "he.png"
    Image.fromarray(picture).save(path)
    images = {
        "array": lambda: picture,
        "path": lambda: str(path),
        "zarr": lambda: zarr.create_array(str(tmp_path / "he.zarr"), data=picture),
        "pillow": lambda: Image.fromarray(picture),
    }
    sf.pp.tile(adata, images[kind](), image_scale=FACTOR)
    record = recorded(adata)
    assert record["image"] == "file"
    slide = as_slides(adata)[0]
    expected = as_slides(visium())[0].tiles.read([0, 7], size_um=100, size_px=50)
    np.testing.assert_array_equal(slide.tiles.read([0, 7], size_um=100, size_px=50), expected)
    assert slide.tiles.source.fingerprint() == record["fingerprint"]
    sf.pp.tile(adata, niche_um=300)  # the image that was given before is used again
    assert recorded(adata)["path"] == record["path"]
    assert recorded(adata)["image_scale"] == FACTOR


def test_given_scale_survives_a_second_call():
    adata = visium(diameter_px=None)[:4].copy()  # too few spots for a lattice
    sf.pp.tile(adata, mpp=0.6, platform="Visium")
    sf.pp.tile(adata, spot_um=70, niche_um=300)
    assert recorded(adata)["mpp"] == 0.6


def test_copy_leaves_the_object_alone():
    adata = visium()
    check = untouched(adata)
    new = sf.pp.tile(adata, copy=True)
    check()
    assert recorded(new)["n_tiles"] == adata.n_obs


def two_libraries() -> ad.AnnData:
    parts = [visium(library=name) for name in ("s1", "s2")]
    parts[1].obsm["spatial"] = parts[1].obsm["spatial"] + 20
    both = ad.concat(parts, label="library_id", keys=["s1", "s2"], index_unique="-")
    both.uns["spatial"] = {name: part.uns["spatial"][name] for name, part in zip(("s1", "s2"), parts, strict=True)}
    return both


def test_libraries_have_records_of_their_own():
    adata = two_libraries()
    sf.pp.tile(adata, library_key="library_id", mpp={"s1": 0.5, "s2": 0.51})
    assert recorded(adata, "s1")["mpp"] == 0.5
    assert recorded(adata, "s2")["mpp"] == 0.51
    assert recorded(adata, "s2")["n_tiles"] == adata.n_obs // 2
    assert [s.tiles.n_obs for s in as_slides(adata, library_key="library_id")] == [16, 16]


def test_image_missing_for_one_library():
    adata = two_libraries()
    del adata.uns["spatial"]["s2"]["images"]
    check = untouched(adata)
    with pytest.raises(MissingKeyError, match=r"Library 's2' has no image.*image="):
        sf.pp.tile(adata, library_key="library_id")
    check()
    sf.pp.tile(adata, {"s2": tissue()}, library_key="library_id", image_scale=FACTOR)
    assert recorded(adata, "s1")["image"] == "uns"
    assert recorded(adata, "s2")["image"] == "file"
    with pytest.raises(MissingKeyError, match="Did you mean 's2'"):
        sf.pp.tile(adata, {"s22": tissue()}, library_key="library_id")


def test_no_coordinates():
    adata = visium()
    del adata.obsm["spatial"]
    check = untouched(adata)
    with pytest.raises(MissingKeyError, match="spatial_key="):
        sf.pp.tile(adata)
    check()


def test_coordinates_off_the_image():
    adata = visium()
    adata.obsm["spatial"][3] = [5000, 400]
    check = untouched(adata)
    with pytest.raises(InputError, match=r"1 of 16 spots lie off the image .*1250.* on 400 x 240 px"):
        sf.pp.tile(adata)
    check()


def test_swapped_coordinates_that_fall_off_the_image_are_named():
    adata = visium()
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1] + [0, 500.0]
    check = untouched(adata)
    with pytest.raises(InputError, match="With x and y exchanged all lie on it"):
        sf.pp.tile(adata)
    check()


def swapped(n: int = 12) -> ad.AnnData:
    """Spots that lie on tissue at (x, y) and on glass at (y, x), in an image that holds both."""
    image = np.full((400, 400, 3), 240, np.uint8)
    image[250:, :200] = (170, 80, 150)
    x, y = (a.ravel().astype(float) for a in np.meshgrid(np.linspace(10, 190, n), np.linspace(260, 390, n)))
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(n * n)]))
    adata.obsm["spatial"] = np.stack([y, x], axis=1)
    factors = {"tissue_hires_scalef": 1.0}
    adata.uns["spatial"] = {"s1": {"images": {"hires": image}, "scalefactors": factors}}
    return adata


def test_swapped_coordinates_warn_by_overlap_with_tissue():
    adata = swapped()
    options = {"mpp": 1.0, "spot_um": 20, "niche_um": 60}
    with pytest.warns(StfmWarning, match=r"0% of the spots lie on tissue, 100% with x and y exchanged"):
        sf.pp.tile(adata, **options)
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.pp.tile(adata, **options)


@pytest.mark.parametrize("layout", ["visium", "st"])
def test_swapped_coordinates_of_a_nearly_square_slide_warn_by_the_array(layout: str):
    adata = sf.datasets.toy(n_spots=150, layout=layout, mpp=4.0)
    adata.uns["spatial"]["section_1"]["images"]["hires"] = np.full((1600, 1600, 3), 240, np.uint8)  # room both ways
    sf.pp.tile(adata, copy=True)  # warnings are errors
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()
    with pytest.warns(StfmWarning, match=r"x grows with obs\['array_row'\].*as if x and y were exchanged") as told:
        sf.pp.tile(adata, copy=True)
    assert len(told) == 1
    adata.obs.loc[adata.obs_names[:2], ["array_row", "array_col"]] = np.nan
    with pytest.warns(StfmWarning, match="x grows with"):
        sf.pp.tile(adata)


def test_a_turned_slide_is_no_exchange():
    row, column = (part.ravel().astype(float) for part in np.mgrid[:9, :12])
    xy, positions = np.column_stack([100 * column, 100 * row]), np.column_stack([column, row])
    for quarter in range(4):
        assert not exchanged_on_array(xy, positions), quarter
        assert exchanged_on_array(xy[:, ::-1], positions) == (quarter % 2 == 0)
        xy = np.column_stack([-xy[:, 1], xy[:, 0]])
    assert not exchanged_on_array(np.random.default_rng(0).random(xy.shape), positions)  # explained by nothing
    assert not exchanged_on_array(xy, positions * [1, 0])
    assert not exchanged_on_array(xy * [1, 0], positions)
    assert not exchanged_on_array(xy[:2], positions[:2])


@pytest.mark.parametrize("section", ["dlpfc_151673", "dlpfc_151675", "her2st_B4", "her2st_C2", "her2st_G2", "mob_1"])
def test_real_arrays_lie_under_their_spots(shared_data, section: str):
    adata = ad.read_h5ad(shared_data / "h5ad" / f"{section}.h5ad", backed="r")
    xy, positions = adata.obsm["spatial"], adata.obs[["array_col", "array_row"]].to_numpy(float)
    assert not exchanged_on_array(xy, positions)
    assert exchanged_on_array(xy[:, ::-1], positions)
    adata.file.close()


def test_scale_not_known_names_mpp():
    adata = visium(diameter_px=None)
    adata.obsm["spatial"] = adata.obsm["spatial"] + np.random.default_rng(0).uniform(-40, 40, (16, 2))
    check = untouched(adata)
    with pytest.raises(InputError, match=r"µm/px is not known.*mpp="):
        sf.pp.tile(adata)
    check()
    sf.pp.tile(adata, mpp=MPP, platform="Visium")


def test_tile_sizes_not_known():
    adata = swapped()
    adata = adata[:5].copy()
    check = untouched(adata)
    with pytest.raises(InputError, match="spot_um= and niche_um="):
        sf.pp.tile(adata, mpp=1.0)
    check()


def test_empty_object():
    adata = visium()[:0].copy()
    with pytest.raises(InputError, match="no spots"):
        sf.pp.tile(adata)
    assert "stfm" not in adata.uns


def test_one_spot():
    adata = visium()[5].copy()
    sf.pp.tile(adata)  # the scale comes from the diameter
    assert (recorded(adata)["n_tiles"], recorded(adata)["mpp_source"]) == (1, "spot diameter")
    adata = visium(diameter_px=None)[5].copy()
    check = untouched(adata)
    with pytest.raises(InputError, match="mpp="):
        sf.pp.tile(adata)
    check()


def test_a_view_becomes_an_object_with_a_warning():
    adata = visium()
    view = adata[:14]
    with pytest.warns(StfmWarning, match="view"):
        sf.pp.tile(view)
    assert not view.is_view
    assert recorded(view)["n_tiles"] == 14
    assert "stfm" not in adata.uns
    bad = adata[:14]
    with pytest.raises(InputError, match="spot_um"):
        sf.pp.tile(bad, spot_um=-1)
    assert bad.is_view


def test_a_backed_object_stays_on_disk(tmp_path):
    visium().write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sf.pp.tile(adata)
    assert adata.isbacked
    assert recorded(adata)["n_tiles"] == 16
    new = sf.pp.tile(adata, spot_um=70, copy=True)
    assert recorded(new)["spot_um"] == 70
    assert recorded(adata)["spot_um"] == 55
    adata.file.close()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_truncated_image_file(tmp_path, suffix):
    path = tmp_path / f"he{suffix}"
    Image.fromarray(tissue()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    adata = visium()
    check = untouched(adata)
    with pytest.raises(DataIntegrityError, match="cut short"):
        sf.pp.tile(adata, path, image_scale=FACTOR)
    check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spot_px": 0}, InputError, "spot_px"),
        ({"niche_px": 2.5}, WrongTypeError, "niche_px"),
        ({"niche_um": np.inf}, InputError, "niche_um"),
        ({"image_scale": 0}, InputError, "image_scale"),
        ({"mpp": -1.0}, InputError, "mpp"),
        ({"image_key": "fullres"}, MissingKeyError, "no 'fullres'"),
        ({"platform": "Visum"}, MissingKeyError, "isium"),
        ({"library_key": "nope"}, MissingKeyError, "nope"),
        ({"spatial_key": "X_pca"}, MissingKeyError, "spatial_key="),
        ({"image": "nowhere.png"}, InputError, "There is no image"),
        ({"image": 3}, WrongTypeError, "int"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    adata = visium()
    check = untouched(adata)
    with pytest.raises(error, match=message):
        sf.pp.tile(adata, **arguments)
    check()


def test_only_anndata():
    with pytest.raises(WrongTypeError, match="AnnData"):
        sf.pp.tile("slide.h5ad")


def test_contradicting_scale_factor_is_told():
    adata = visium(diameter_px=55 / 0.39)
    with pytest.warns(StfmWarning, match=r"0\.500 by the 100-µm hex lattice.*0\.390"):
        sf.pp.tile(adata)
    assert recorded(adata)["mpp"] == pytest.approx(0.5)


@pytest.mark.parametrize("section", ["151673", "151674", "151675"])
def test_dlpfc_lattice_wins_and_x_y_are_seen(shared_data, section):
    adata = ad.read_h5ad(shared_data / "h5ad" / f"dlpfc_{section}.h5ad")
    with pytest.warns(StfmWarning, match=r"it would be 0\.571") as told:
        sf.pp.tile(adata)
    assert len(told) == 1
    record = recorded(adata, section)
    assert record["mpp"] == pytest.approx(0.726, abs=0.003)
    assert record["native_mpp"] == pytest.approx(16.1, abs=0.1)
    assert record["image_key"] == "lowres"
    slide = as_slides(adata, modalities=("image",))[0]
    assert slide.tiles.read([0, 1], size_um=255, size_px=224).shape == (2, 224, 224, 3)
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()
    with pytest.warns(StfmWarning) as told:
        sf.pp.tile(adata)
    assert any("x and y exchanged" in str(w.message) for w in told)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "jpeg"), [("C2", "C/C2/5714_HE_BT_C2.jpg"), ("B4", "B/B4/BT10737_D2_HE.jpg")])
def test_her2st_from_its_jpeg(shared_data, section, jpeg):
    adata = ad.read_h5ad(shared_data / "h5ad" / f"her2st_{section}.h5ad")
    path = shared_data / "cache" / "her2st" / "data" / "ST-imgs" / jpeg
    sf.pp.tile(adata, path, platform="ST")
    record = recorded(adata, "slide")
    assert 0.68 < record["mpp"] < 0.695
    assert (record["spot_um"], record["niche_um"], record["n_niche_padded"]) == (100.0, 500.0, 0)
    tiles = as_slides(adata)[0].tiles.read(np.arange(adata.n_obs), size_um=100, size_px=28)
    assert tiles.std(axis=(1, 2, 3)).mean() > 10  # tissue, not glass
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1].copy()
    with pytest.warns(StfmWarning, match="x and y exchanged"):
        sf.pp.tile(adata, path, platform="ST")


def test_mob_from_its_jpeg(shared_data):
    adata = ad.read_h5ad(shared_data / "h5ad" / "mob_1.h5ad")
    with pytest.warns(StfmWarning, match="taken as ST 2k"):
        sf.pp.tile(adata, shared_data / "cache/mob/inst/extdata/counts/MOB1.jpg")
    assert recorded(adata, "slide")["mpp"] == pytest.approx(4.4, abs=0.05)


def test_tissue_mask():
    mask = tissue_mask(tissue())
    assert mask[100:230, 10:190].all()
    assert not mask[:70].any()
    assert tissue_mask(np.full((20, 20, 3), 200, np.uint8)) is None
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (20, 20, 1), dtype=np.uint8), 3, axis=2)
    assert tissue_mask(grey) is None
    assert 10 <= otsu(np.bincount([10] * 50 + [200] * 30, minlength=256)) < 200
