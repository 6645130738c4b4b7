"""``pl.niches``: who is whose neighbour, over the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import MissingKeyError
from stfm._keys import NICHE, SPATIAL
from stfm._validate import did_you_mean
from stfm.get._niches import niche_table
from stfm.slide.from_anndata import Library, coordinates, find_image, libraries, scale_of
from stfm.slide.readers import open_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stfm.slide.niches import NicheTable

_IMAGE_PX = 1200  # the image behind the spots is read at the level that is just finer than this
_BARS_UM = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def niches(
    adata: AnnData,
    spots: str | int | Sequence[str | int] | None = None,
    *,
    key: str = NICHE,
    library: str | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    image: bool = True,
    size: float = 6.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the niche graph of a library, or the niches of some spots close up, over the H&E image where there is one.

    Parameters
    ----------
    adata
        Object that :func:`stfm.pp.build_niches` was run on.
    spots
        Names or positions of spots whose niches are drawn, with the tissue around them; None draws the whole graph.
    key
        What was ``key_added``.
    library
        Library to draw; by default that of the first spot.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates; the first two are drawn.
    image
        Draw the H&E image behind the spots, if there is one.
    size
        Area of a spot in points squared.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    The Axes. The lines are its first collection, the spots the second, the chosen spots and their niches those after.

    Raises
    ------
    MissingKeyError
        There are no niches, or a spot or library does not exist.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> sf.pp.build_niches(adata, n_neighbors=6)
    >>> ax = sf.pl.niches(adata)
    """
    from matplotlib import pyplot as plt
    from matplotlib.collections import LineCollection

    table = niche_table(adata, key=key)
    coords = coordinates(adata, spatial_key)
    chosen = _positions(adata, spots)
    shown = _library(libraries(adata, library_key), library, chosen)
    xy = coords[:, :2]
    window = _window(xy, table, shown.rows, chosen)
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 5))
    pictured = image and _image(ax, adata, shown, window)
    rows = shown.rows if chosen is None else chosen
    start, stop = _edges(table, rows)
    segments = np.stack([xy[start], xy[stop]], axis=1)
    ax.add_collection(LineCollection(list(segments), colors="0.15" if pictured else "0.5", linewidths=0.8, zorder=2))
    _dots(ax, xy[shown.rows], size, "0.75", zorder=1.5, alpha=0.7 if pictured else 1.0)
    if chosen is not None:
        _dots(ax, xy[np.unique(stop)], 3 * size, "tab:orange", zorder=3)
        _dots(ax, xy[chosen], 4 * size, "tab:red", zorder=4)
    ax.set(xlim=window[:2], ylim=window[:1:-1], aspect="equal", xticks=[], yticks=[])  # y grows downwards, as in images
    scale = scale_of(adata, shown, coords)
    if scale is not None:
        _scale_bar(ax, scale.mpp, window[1] - window[0])
    k = table.degree[rows].mean() if len(rows) else 0.0
    ax.set_title(f"{shown.name}: {k:.3g} neighbours a spot" if len(rows) > 1 else f"{adata.obs_names[rows[0]]}")
    return ax


def _positions(adata: AnnData, spots: str | int | Sequence[str | int] | None) -> NDArray[np.intp] | None:
    """Return the positions of spots given by name or position."""
    if spots is None:
        return None
    wanted = [spots] if isinstance(spots, (str, int, np.integer)) else list(spots)
    found = []
    for spot in wanted:
        if isinstance(spot, str):
            if spot not in adata.obs_names:
                msg = f"There is no spot {spot!r}. {did_you_mean(spot, adata.obs_names[:2000])}"
                raise MissingKeyError(msg)
            found.append(int(adata.obs_names.get_indexer([spot])[0]))
            continue
        if not 0 <= spot < adata.n_obs:
            msg = f"There is no spot at position {spot}; adata has {adata.n_obs}."
            raise MissingKeyError(msg)
        found.append(int(spot))
    return np.asarray(found, np.intp)


def _library(found: list[Library], name: str | None, chosen: NDArray[np.intp] | None) -> Library:
    """Return the library that is drawn."""
    if name is None:
        first = found[0].rows[0] if chosen is None or len(chosen) == 0 else chosen[0]
        return next(library for library in found if first in library.rows)
    named = {library.name: library for library in found}
    if name not in named:
        msg = f"adata has no library {name!r}. {did_you_mean(name, named)}"
        raise MissingKeyError(msg)
    return named[name]


def _edges(table: NicheTable, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return both ends of the lines from spots to their neighbours."""
    start, column = np.nonzero(table.index[rows] >= 0)
    return rows[start], table.index[rows[start], column].astype(np.intp)


def _window(
    xy: NDArray[np.float64], table: NicheTable, rows: NDArray[np.intp], chosen: NDArray[np.intp] | None
) -> tuple[float, float, float, float]:
    """Return the part of the plane that is drawn: the library, or the niches with as much again around them."""
    inside = xy[rows]
    if chosen is not None and len(chosen):
        inside = xy[np.concatenate([chosen, _edges(table, chosen)[1]])]
    low, high = inside.min(axis=0), inside.max(axis=0)
    nearest = table.distance[np.isfinite(table.distance)]
    reach = max(float((high - low).max()), float(np.median(nearest)) if chosen is not None and len(nearest) else 0.0)
    pad = (0.04 if chosen is None else 0.75) * (reach or 1.0)
    return low[0] - pad, high[0] + pad, low[1] - pad, high[1] + pad


def _image(ax: Axes, adata: AnnData, library: Library, window: tuple[float, float, float, float]) -> bool:
    """Draw the image under a window; return whether there is one."""
    found = find_image(adata, library)
    if found is None:
        return False
    source, factor = open_image(found[0]), found[1]
    left, right, top, bottom = (value * factor for value in window)
    wanted = max(right - left, bottom - top) / _IMAGE_PX
    level = max((i for i, d in enumerate(source.downsamples) if d <= max(wanted, 1.0)), default=0)
    down = source.downsamples[level]
    height, width = source.level_shape(level)
    x0, x1 = (int(np.clip(np.floor(v / down), 0, width)) for v in (left, right + down))
    y0, y1 = (int(np.clip(np.floor(v / down), 0, height)) for v in (top, bottom + down))
    if x1 <= x0 or y1 <= y0:
        return False
    pixels = source.read(level, y0, x0, y1 - y0, x1 - x0)
    step = down / factor
    ax.imshow(pixels, extent=(x0 * step, x1 * step, y1 * step, y0 * step), zorder=1)
    return True


def _dots(ax: Axes, xy: NDArray[np.float64], size: float, color: str, *, zorder: float, alpha: float = 1.0) -> None:
    """Draw spots."""
    ax.scatter(xy[:, 0], xy[:, 1], s=size, c=color, edgecolors="white", linewidths=0.3, alpha=alpha, zorder=zorder)


def _scale_bar(ax: Axes, mpp: float, width: float) -> None:
    """Draw a bar of a round length, about a fifth of the width."""
    um = max((bar for bar in _BARS_UM if bar <= 0.3 * width * mpp), default=None)
    if um is None:
        return
    share = um / mpp / width
    ax.plot([0.04, 0.04 + share], [0.04, 0.04], color="black", linewidth=3, transform=ax.transAxes, zorder=5)
    ax.text(0.04 + share / 2, 0.055, f"{um} µm", ha="center", va="bottom", transform=ax.transAxes, zorder=5)
