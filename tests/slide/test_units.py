"""µm/px: lattices are seen through holes and jitter, and the evidence is weighed in the stated order."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stfm.errors import InputError, MissingKeyError, StfmWarning
from stfm.slide.units import PLATFORMS, Scale, default_tile_um, detect_lattice, get_platform, resolve_mpp


def lattice(kind: str, pitch: float = 1.0, n: int = 24) -> np.ndarray:
    x, y = (a.ravel().astype(float) for a in np.meshgrid(np.arange(n), np.arange(n)))
    if kind == "hex":
        x, y = x + 0.5 * (y % 2), y * np.sqrt(3) / 2
    return np.stack([x, y], axis=1) * pitch


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["hex", "square"]),
    pitch=st.floats(1e-2, 1e4),
    angle=st.floats(0, 6.3),
    keep=st.floats(0.4, 1.0),
    jitter=st.floats(0.0, 0.05),
    seed=st.integers(0, 99),
)
def test_lattice_is_seen_through_holes_jitter_and_rotation(kind, pitch, angle, keep, jitter, seed):
    rng = np.random.default_rng(seed)
    xy = lattice(kind)
    xy = xy[rng.random(len(xy)) < keep]
    xy = xy + rng.normal(0, jitter, xy.shape)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = detect_lattice(xy @ turn * pitch + 1000 * pitch)
    assert found.kind == kind
    assert found.pitch == pytest.approx(pitch, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 999))
def test_scattered_points_are_no_lattice(n, seed):
    assert detect_lattice(np.random.default_rng(seed).random((n, 2))).kind == "none"


def test_a_line_duplicates_and_nan_are_no_lattice():
    assert detect_lattice(np.c_[np.arange(60.0), np.zeros(60)]).kind == "none"
    assert detect_lattice(np.ones((60, 2))).kind == "none"
    assert detect_lattice(np.full((60, 2), np.nan)).kind == "none"
    assert detect_lattice(np.concatenate([lattice("hex"), lattice("hex"), [[np.nan, 1]]])).kind == "hex"


def test_many_bins_are_judged_on_a_window():
    assert detect_lattice(lattice("square", 7.3, n=400)).pitch == pytest.approx(7.3)


def test_evidence_in_order():
    xy = lattice("none", 10.0, n=20) + np.random.default_rng(0).uniform(-4, 4, (400, 2))
    options = {"metadata_mpp": 0.5, "spot_diameter_px": 110.0, "platform": "Visium"}
    assert resolve_mpp(xy, mpp=0.51, **options) == Scale(0.51, "argument", "none", None, None, "Visium")
    found = resolve_mpp(xy, **options)
    assert (found.mpp, found.source) == (0.5, "metadata")
    found = resolve_mpp(xy, spot_diameter_px=110.0)
    assert (found.mpp, found.source) == (0.5, "spot diameter")
    assert resolve_mpp(xy, platform="Xenium").mpp == 1.0


def test_pitch_of_visium_needs_no_platform():
    found = resolve_mpp(lattice("hex", 200.0))
    assert (found.source, found.lattice, found.platform) == ("pitch", "hex", "Visium")
    assert found.mpp == pytest.approx(0.5)
    assert found.message is None


def test_lattice_wins_over_contradicting_spot_diameter():
    pitch = 100 / 0.726
    with pytest.warns(StfmWarning, match=r"0\.726 by the 100-µm hex lattice.*55 µm it would be 0\.571.*pass mpp="):
        found = resolve_mpp(lattice("hex", pitch), spot_diameter_px=55 / 0.571)
    assert found.mpp == pytest.approx(0.726)
    assert found.message is not None


def test_places_on_the_array_show_the_lattice_of_scattered_spots():
    x, y = (a.ravel() for a in np.meshgrid(np.arange(60), np.arange(60)))
    places = np.stack([2 * x + y % 2, y], axis=1)
    rng = np.random.default_rng(0)
    few = rng.choice(len(x), 60, replace=False)
    coords = lattice("hex", 200.0, n=60) + rng.normal(scale=2.0, size=(3600, 2))
    assert detect_lattice(coords[few]).kind == "none"
    with pytest.warns(StfmWarning, match="lattice.*which is used; by the spot diameter"):
        found = resolve_mpp(coords[few], spot_diameter_px=70.0, array_positions=places[few])
    assert (found.source, found.lattice) == ("pitch", "hex")
    assert found.mpp == pytest.approx(0.5, rel=0.01)
    # Places that are no array, or not that of these spots, say nothing.
    for wrong in (rng.permutation(places[few]), np.stack([x, y], axis=1)[few], np.full((60, 2), np.nan)):
        assert resolve_mpp(coords[few], spot_diameter_px=110.0, array_positions=wrong).source == "spot diameter"


def test_agreeing_evidence_is_silent():
    found = resolve_mpp(lattice("hex", 200.0), spot_diameter_px=110.0, metadata_mpp=0.501)
    assert (found.source, found.message) == ("pitch", None)


def test_argument_is_kept_against_the_lattice_and_told():
    with pytest.warns(StfmWarning, match=r"0\.250 by mpp=.*lattice.*0\.500"):
        assert resolve_mpp(lattice("hex", 200.0), mpp=0.25).mpp == 0.25


def test_dlpfc_lattice_wins(shared_data):
    import anndata as ad

    adata = ad.read_h5ad(shared_data / "h5ad" / "dlpfc_151673.h5ad")
    factors = adata.uns["spatial"]["151673"]["scalefactors"]
    with pytest.warns(StfmWarning, match=r"it would be 0\.571"):
        found = resolve_mpp(adata.obsm["spatial"], spot_diameter_px=factors["spot_diameter_fullres"])
    assert found.mpp == pytest.approx(0.726, abs=0.003)
    assert (found.lattice, found.platform) == ("hex", "Visium")


@pytest.mark.parametrize("section", ["C2", "B4", "G2"])
def test_her2st_has_an_adjusted_square_lattice(shared_data, section):
    import anndata as ad

    adata = ad.read_h5ad(shared_data / "h5ad" / f"her2st_{section}.h5ad")
    found = resolve_mpp(adata.obsm["spatial"], platform="ST")
    assert 0.68 < found.mpp < 0.695
    assert found.lattice == "square"


def test_mob_is_a_2k_array(shared_data):
    import anndata as ad

    adata = ad.read_h5ad(shared_data / "h5ad" / "mob_1.h5ad")
    assert resolve_mpp(adata.obsm["spatial"], platform="ST 2k").mpp == pytest.approx(4.4, abs=0.05)
    with pytest.warns(StfmWarning, match="taken as ST 2k"):
        found = resolve_mpp(adata.obsm["spatial"], array_positions=adata.obs[["array_col", "array_row"]])
    assert found.mpp == pytest.approx(4.4, abs=0.05)


def test_square_lattice_without_platform_is_st_and_told():
    with pytest.warns(StfmWarning, match=r"no platform is given: taken as ST.*platform="):
        found = resolve_mpp(lattice("square", 400.0))
    assert found.mpp == pytest.approx(0.5)
    found = resolve_mpp(lattice("square", 400.0), metadata_mpp=0.4)  # an assumption overrules nothing
    assert (found.mpp, found.source) == (0.4, "metadata")


def test_bins_that_touch_are_not_taken_for_st():
    with pytest.raises(InputError, match=r"square lattice of pitch 29.* mpp="):
        resolve_mpp(lattice("square", 29.0), spot_diameter_px=29.0)
    assert resolve_mpp(lattice("square", 29.2), spot_diameter_px=29.2, metadata_mpp=0.274).mpp == pytest.approx(
        8 / 29.2
    )
    assert resolve_mpp(lattice("square", 29.2), platform="visium_hd").mpp == pytest.approx(8 / 29.2)


@pytest.mark.parametrize(("size", "platform"), [(2, "Visium HD 2"), (8, "Visium HD 8"), (16, "Visium HD 16")])
@pytest.mark.parametrize("named", [None, "Visium HD"])
def test_bins_are_told_apart_by_their_size(size, platform, named):
    mpp = 0.2737
    found = resolve_mpp(lattice("square", size / mpp), spot_diameter_px=size / mpp, metadata_mpp=mpp, platform=named)
    assert (found.platform, found.message) == (platform, None)
    assert found.mpp == pytest.approx(mpp)
    with pytest.raises(InputError, match="mpp="):
        resolve_mpp(lattice("square", size / mpp), spot_diameter_px=size / mpp)


@pytest.mark.parametrize("size", [8, 16])
def test_visium_hd_bundle(shared_data, size):
    import json

    import pandas as pd

    folder = shared_data / "bundles/seurat_testdata/visium_hd/binned_outputs" / f"square_{size:03d}um" / "spatial"
    factors = json.loads((folder / "scalefactors_json.json").read_text())
    table = pd.read_parquet(folder / "tissue_positions.parquet")
    xy = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    found = resolve_mpp(
        xy, metadata_mpp=factors["microns_per_pixel"], spot_diameter_px=factors["spot_diameter_fullres"]
    )
    assert found.mpp == pytest.approx(0.2738, abs=0.001)
    assert found.platform == f"Visium HD {size}"


@pytest.mark.parametrize("xy", [np.zeros((0, 2)), [[3.0, 4.0]], np.random.default_rng(0).random((50, 2))])
def test_nothing_known_names_mpp(xy):
    with pytest.raises(InputError, match="Pass mpp="):
        resolve_mpp(xy)


@pytest.mark.parametrize("name", ["mpp", "metadata_mpp", "spot_diameter_px"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_values_must_be_positive(name, value):
    with pytest.raises(InputError, match=name):
        resolve_mpp(lattice("hex"), **{name: value})


def test_platform_names():
    assert [get_platform(n).name for n in ("visium", "VISIUM", "10x Visium", "st", "ST-2K")] == [
        *["Visium"] * 3,
        "ST",
        "ST 2k",
    ]
    assert get_platform(get_platform("Xenium")).unit == "um"
    with pytest.raises(MissingKeyError, match="'visium'|'Visium'"):
        get_platform("visum")


def test_platform_table_is_sound():
    table = PLATFORMS.frame()
    assert {"ST", "Visium", "Visium HD 2", "Visium HD 8", "Visium HD 16", "Xenium", "CosMx", "MERSCOPE"} <= set(
        table.index
    )
    on_lattice = table[(table.lattice != "none") & (table.pitch_um >= 8)]
    np.testing.assert_allclose(on_lattice.niche_um, 2 * on_lattice.pitch_um + on_lattice.diameter_um)
    assert (table.spot_um >= table.diameter_um).all()
    assert set(table.unit) == {"px", "um"}


def test_default_tiles():
    assert default_tile_um(resolve_mpp(lattice("hex", 200.0))) == (55.0, 255.0)
    assert default_tile_um(Scale(0.5, "argument", "none", None, None), "ST") == (100.0, 500.0)
    with pytest.raises(InputError, match="spot_um= and niche_um="):
        default_tile_um(Scale(0.5, "argument", "none", None, None))


def test_importing_units_parses_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from stfm.slide import platforms
    assert platforms.PLATFORMS.kind == "platform"
