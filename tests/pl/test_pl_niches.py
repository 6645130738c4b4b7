"""pl.niches draws the lines and spots of the table, in the place asked for."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import stfm as sf
from stfm._errors import MissingKeyError
from stfm.pl._niches import niches


@pytest.fixture
def adata() -> ad.AnnData:
    r, c = np.divmod(np.arange(100), 10)
    xy = np.column_stack([(c + 0.5 * (r % 2)) * 100.0 + 50, r * 86.6 + 50])
    coords = np.vstack([xy, xy])
    obs = pd.DataFrame(
        {"library": np.repeat(["left", "right"], 100)}, index=[f"{side}-{i}" for side in "lr" for i in range(100)]
    )
    adata = ad.AnnData(obs=obs, obsm={"spatial": coords})
    sf.pp.build_niches(adata, 6)
    return adata


def with_image(adata: ad.AnnData) -> ad.AnnData:
    picture = np.zeros((100, 120, 3), np.uint8)
    picture[:, :60] = 200
    adata.uns["spatial"] = {
        name: {"images": {"hires": picture}, "scalefactors": {"tissue_hires_scalef": 0.1}} for name in ("left", "right")
    }
    return adata


def test_whole_graph(adata):
    ax = niches(adata)
    lines, spots = ax.collections
    assert len(lines.get_segments()) == 600
    np.testing.assert_array_equal(spots.get_offsets(), adata.obsm["spatial"][:100])
    assert ax.yaxis_inverted()
    assert "left: 6 neighbours" in ax.get_title()
    assert len(ax.images) == 0


def test_one_spot_close_up(adata):
    _, own = plt.subplots()
    ax = niches(adata, "r-44", ax=own)
    assert ax is own
    lines, spots, near, center = ax.collections
    table = sf.get.niche_table(adata)
    assert len(lines.get_segments()) == 6
    np.testing.assert_array_equal(
        np.sort(near.get_offsets(), axis=0), np.sort(adata.obsm["spatial"][table.index[144]], axis=0)
    )
    np.testing.assert_array_equal(center.get_offsets(), adata.obsm["spatial"][[144]])
    assert len(spots.get_offsets()) == 100
    low, high = ax.get_xlim()
    assert low < center.get_offsets()[0, 0] < high
    assert high - low < 600


def test_image_lies_under_its_spots(adata):
    ax = niches(with_image(adata), library="right", library_key="library")
    (picture,) = ax.images
    left, right, bottom, top = picture.get_extent()
    assert top < bottom
    pixels = np.asarray(picture.get_array())
    edge = left + (right - left) * np.flatnonzero(pixels[5, :, 0] == 0)[0] / pixels.shape[1]
    assert edge == pytest.approx(600, abs=15)  # 60 px at a tenth
    assert len(niches(adata, image=False).images) == 0
    assert len(niches(adata, [3, "l-50"]).images) == 1


def test_scale_bar_is_true(adata):
    ax = niches(adata)
    (bar,) = ax.lines
    (label,) = ax.texts
    share = np.ptp(bar.get_xdata())
    low, high = ax.get_xlim()
    um = float(label.get_text().removesuffix(" µm"))
    assert share * (high - low) == pytest.approx(um, rel=0.01)  # 100 px are 100 µm


def test_refusals(adata):
    with pytest.raises(MissingKeyError, match="no spot 'r-444'. Did you mean 'r-44'"):
        niches(adata, "r-444")
    with pytest.raises(MissingKeyError, match="no spot at position 200"):
        niches(adata, 200)
    with pytest.raises(MissingKeyError, match="no library 'middle'"):
        niches(adata, library="middle")
    with pytest.raises(MissingKeyError, match="key_added='ring'"):
        niches(adata, key="ring")
