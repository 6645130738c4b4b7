"""Spots over the H&E at their true size: what the spatial plots share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import InputError, MissingKeyError, WrongTypeError
from stfm._palette import MISSING, category_colors
from stfm._validate import check_positive, did_you_mean
from stfm.slide.from_anndata import coordinates, find_image, libraries, scale_of
from stfm.slide.platforms import get_platform

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import EllipseCollection
    from numpy.typing import NDArray

__all__ = [
    "Ground",
    "axes_for",
    "category_palette",
    "check_adata",
    "draw_categories",
    "draw_values",
    "ground",
    "legend_of",
    "stage",
]

_IMAGE_PX = 1600  # an image larger than this is read at a coarser level
_BARS_UM = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Ground:
    """One library laid out for drawing, in px of the full-resolution image (µm where there is no image).

    Attributes
    ----------
    name
        Name of the library.
    rows
        Its spots, as rows of the object.
    xy
        Their centres ``(n, 2)``.
    diameter
        Diameter of a spot, in the same unit.
    mpp
        µm a unit, where known.
    picture
        Image uint8 ``(h, w, 3)`` and the place of its borders (left, right, bottom, top), or None.
    """

    name: str
    rows: NDArray[np.int64]
    xy: NDArray[np.float64]
    diameter: float
    mpp: float | None
    picture: tuple[NDArray[np.uint8], tuple[float, float, float, float]] | None

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The part of the plane that is drawn: left, right, bottom, top (y grows downwards, as in images)."""
        low, high = self.xy.min(axis=0), self.xy.max(axis=0)
        pad = max(self.diameter, 0.03 * float((high - low).max()))
        return low[0] - pad, high[0] + pad, high[1] + pad, low[1] - pad


def check_adata(adata: Any) -> None:
    """Refuse what is not AnnData."""
    from anndata import AnnData as Class

    if not isinstance(adata, Class):
        msg = f"adata must be AnnData, got {type(adata).__name__}."
        raise WrongTypeError(msg)


def ground(
    adata: AnnData, library: str | None = None, *, library_key: str | None, spatial_key: str, image: bool
) -> list[Ground]:
    """Return the libraries to draw: the one named, or all of them."""
    check_adata(adata)
    coords = coordinates(adata, spatial_key)
    found = libraries(adata, library_key)
    if library is not None:
        names = [one.name for one in found]
        if library not in names:
            msg = f"There is no library {library!r}. {did_you_mean(library, names)}"
            raise MissingKeyError(msg)
        found = [one for one in found if one.name == library]
    grounds = []
    for one in found:
        scale = scale_of(adata, one, coords)
        xy = coords[one.rows, :2]
        place = find_image(adata, one) if image else None
        diameter = _diameter(xy, None if scale is None else scale.mpp, None if scale is None else scale.platform)
        picture = None if place is None else _picture(place[0], place[1], xy, diameter)
        grounds.append(Ground(one.name, one.rows, xy, diameter, None if scale is None else scale.mpp, picture))
    return grounds


def _diameter(xy: NDArray[np.float64], mpp: float | None, platform: str | None) -> float:
    """Return the diameter of a spot: the platform's, else three quarters of the distance between spots."""
    from stfm.slide.niches import knn

    if mpp is not None and platform is not None:
        return get_platform(platform).spot_um / mpp
    if len(xy) < 2:
        return 1.0
    nearest = knn(xy, 1).distance[:, 0]
    return 0.75 * float(np.median(nearest[nearest > 0])) if (nearest > 0).any() else 1.0


def _picture(
    image: Any, factor: float, xy: NDArray[np.float64], diameter: float
) -> tuple[NDArray[np.uint8], tuple[float, float, float, float]] | None:
    """Read the image under the spots at a level that is fine enough for a figure."""
    from stfm.slide.readers import open_image

    source = open_image(image)
    low, high = (xy.min(axis=0) - 2 * diameter) * factor, (xy.max(axis=0) + 2 * diameter) * factor
    wanted = float((high - low).max()) / _IMAGE_PX
    level = max((i for i, d in enumerate(source.downsamples) if d <= max(wanted, 1.0)), default=0)
    down = source.downsamples[level]
    height, width = source.level_shape(level)
    x0, y0 = (int(np.clip(np.floor(v / down), 0, size)) for v, size in zip(low, (width, height), strict=True))
    x1, y1 = (int(np.clip(np.ceil(v / down), 0, size)) for v, size in zip(high, (width, height), strict=True))
    if x1 <= x0 or y1 <= y0:
        return None
    pixels = source.read(level, y0, x0, y1 - y0, x1 - x0)
    step = max(1, round(max(pixels.shape[:2]) / _IMAGE_PX))
    unit = down / factor
    return np.ascontiguousarray(pixels[::step, ::step]), (x0 * unit, x1 * unit, y1 * unit, y0 * unit)


def axes_for(
    n: int,
    ax: Axes | Sequence[Axes] | NDArray[Any] | None,
    *,
    columns: int = 4,
    inches: tuple[float, float] = (4.6, 4.0),
) -> NDArray[Any]:
    """Return ``n`` Axes: those given, or new ones of a size in inches, in a grid."""
    if ax is None:
        from matplotlib import pyplot as plt

        n_columns = min(n, columns)
        n_rows = -(-n // n_columns)
        size = (inches[0] * n_columns, inches[1] * n_rows)
        _, grid = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
        for spare in grid.ravel()[n:]:
            spare.set_axis_off()
        return np.asarray(grid.ravel()[:n])
    given = np.asarray(ax if isinstance(ax, (Sequence, np.ndarray)) else [ax], dtype=object).ravel()
    if len(given) != n:
        msg = f"{n} panels are drawn, but ax holds {len(given)} Axes; give one a panel, or name one library."
        raise InputError(msg)
    return given


def stage(ax: Axes, place: Ground, *, title: str, image_alpha: float = 1.0) -> None:
    """Prepare Axes: image, limits, equal aspect, y downwards, no ticks, scale bar."""
    if place.picture is not None:
        pixels, extent = place.picture
        ax.imshow(pixels, extent=extent, zorder=0, alpha=image_alpha, interpolation="antialiased")
    left, right, bottom, top = place.window
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(title, fontsize=10)
    if place.mpp is not None:
        _scale_bar(ax, place)


def _scale_bar(ax: Axes, place: Ground) -> None:
    """Draw a bar of a round length below the picture, with its length in µm."""
    left, right, _, _ = place.window
    mpp = place.mpp or 1.0
    width = (right - left) * mpp
    length = max((bar for bar in _BARS_UM if bar <= 0.3 * width), default=None)
    if length is None:
        return
    share = length / width
    ax.plot(
        [0.0, share], [-0.025, -0.025], color="0.15", linewidth=2.5, transform=ax.transAxes, clip_on=False,
        solid_capstyle="butt", zorder=5,
    )  # fmt: skip
    text = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
    ax.text(
        share + 0.015, -0.025, text, transform=ax.transAxes, ha="left", va="center", fontsize=8, color="0.15",
        clip_on=False, zorder=5,
    )  # fmt: skip


def _spots(ax: Axes, place: Ground, size: float, **style: Any) -> EllipseCollection:
    """Draw the spots as circles of their true diameter."""
    from matplotlib.collections import EllipseCollection

    check_positive("size", size)
    diameter = np.full(len(place.xy), place.diameter * size)
    circles = EllipseCollection(
        diameter, diameter, np.zeros(len(place.xy)), units="xy", offsets=place.xy, offset_transform=ax.transData,
        linewidths=0, zorder=2, **style,
    )  # fmt: skip
    ax.add_collection(circles)
    return circles


def draw_values(
    ax: Axes,
    place: Ground,
    values: NDArray[np.floating],
    *,
    cmap: str,
    limits: tuple[float, float],
    size: float = 1.0,
    label: str = "",
) -> EllipseCollection:
    """Draw numbers as colours, with a colour bar."""
    circles = _spots(ax, place, size, cmap=cmap)
    circles.set_array(np.asarray(values, dtype=np.float64))
    circles.set_clim(*limits)
    bar = ax.figure.colorbar(circles, ax=ax, shrink=0.7, pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    if label:
        bar.set_label(label, fontsize=8)
    return circles


def draw_categories(
    ax: Axes,
    place: Ground,
    labels: pd.Categorical,
    palette: dict[str, str],
    *,
    size: float = 1.0,
    alpha: float = 1.0,
    legend: bool = True,
) -> EllipseCollection:
    """Draw categories as colours, with a legend beside the picture; spots without one are grey."""
    taken = np.asarray(labels, dtype=object)
    missing = labels.codes < 0
    colors = [MISSING if absent else palette[str(name)] for name, absent in zip(taken, missing, strict=True)]
    circles = _spots(ax, place, size, facecolors=colors, alpha=alpha)
    if legend:
        legend_of(ax, taken, palette)
    return circles


def legend_of(ax: Axes, labels: NDArray[np.object_], palette: dict[str, str]) -> None:
    """Draw a legend of the categories that occur beside the picture, in the order of the palette."""
    import pandas as pd
    from matplotlib.lines import Line2D

    absent = pd.isna(labels)
    present = {str(name) for name in labels[~absent]}
    entries = [(name, color) for name, color in palette.items() if name in present]
    if absent.any():
        entries.append(("none", MISSING))
    handles = [
        Line2D([], [], color=color, label=name, marker="o", linestyle="", markersize=7, markeredgewidth=0)
        for name, color in entries
    ]
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "handletextpad": 0.3, "labelspacing": 0.45}
    columns = 1 + (len(entries) - 1) // 14
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns, **style)


def category_palette(adata: AnnData, key: str, categories: Sequence[str]) -> dict[str, str]:
    """Return the colour of each category: those in ``uns`` where there is one for each, else the colours of stfm."""
    kept = adata.uns.get(f"{key}_colors")
    usable = kept is not None and len(kept) >= len(categories)
    colors = [str(c) for c in kept] if usable and kept is not None else category_colors(len(categories))
    return dict(zip(map(str, categories), colors, strict=False))
