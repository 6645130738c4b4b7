"""The gallery shows the tiles that a model reads."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import stfm as sf
from stfm.errors import InputError, MissingKeyError
from stfm.pl._tiles import tiles
from stfm.slide import as_slides


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    slide = ad.AnnData(obs=pd.DataFrame(index=[f"b{i}" for i in range(30)]))
    slide.obsm["spatial"] = rng.uniform(20, 280, (30, 2))
    image = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    slide.uns["spatial"] = {"s1": {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 1.0}}}
    sf.pp.tile(slide, mpp=1.0, spot_um=28, niche_um=112)
    return slide


def test_grid_of_spot_and_niche_tiles(adata):
    grid = tiles(adata, ["b3", "b7", "b1"])
    assert grid.shape == (2, 3)
    reader = as_slides(adata)[0].tiles
    np.testing.assert_array_equal(grid[0, 1].images[0].get_array(), reader.read([7], size_um=28, size_px=28)[0])
    np.testing.assert_array_equal(grid[1, 2].images[0].get_array(), reader.read([1], size_um=112, size_px=224)[0])
    assert grid[0, 0].get_title() == "b3\nspot 28 µm, 28 px"
    assert grid[1, 0].get_title() == "niche 112 µm, 224 px"
    frame = grid[1, 0].patches[-1]
    assert (frame.get_x(), frame.get_width()) == (0.375, 0.25)


def test_drawn_spots_depend_on_the_seed_alone(adata):
    names = [[a.get_title() for a in tiles(adata, 4, rng=seed)[0]] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]
    assert tiles(adata, 99).shape == (2, 30)
    assert tiles(adata, "b4").shape == (2, 1)


def test_axes_of_the_caller(adata):
    _, axes = plt.subplots(4, 2)
    grid = tiles(adata, 4, ax=axes)
    assert grid.shape == (2, 4)
    assert grid[0, 0] is axes[0, 0]
    before = dict(plt.rcParams)
    _, one = plt.subplots()
    assert tiles(adata, 3, ax=one) is one
    assert one.images[0].get_array().shape == (2 * 224 + 9, 3 * 224 + 18, 3)
    assert "spot 28 µm" in one.get_title()
    assert dict(plt.rcParams) == before
    with pytest.raises(InputError, match="3 spots need 6 Axes"):
        tiles(adata, 3, ax=axes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spots": ["b99"]}, MissingKeyError, "b99"),
        ({"spots": []}, InputError, "spots is empty"),
        ({"spots": 0}, InputError, "spots"),
        ({"library": "s2"}, MissingKeyError, "s1"),
    ],
)
def test_arguments_are_checked(adata, arguments, error, message):
    with pytest.raises(error, match=message):
        tiles(adata, **arguments)


def test_tiles_must_be_recorded_first(adata):
    del adata.uns["stfm"]
    with pytest.raises(MissingKeyError, match=r"run sf\.pp\.tile"):
        tiles(adata)
