"""``pl.attribution``: what moved an output, on the slide."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stfm._errors import InputError, MissingKeyError
from stfm._keys import ATTRIBUTION, SPATIAL, part_key
from stfm._validate import check_choice
from stfm.pl._spatial import axes_for, check_adata, draw_values, ground, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stfm.pl._spatial import Ground

_PARTS = ("all", "image", "gene")
_OF = {"all": "", "image": " (tiles)", "gene": " (counts)"}


def attribution(
    adata: AnnData,
    *,
    key: str = ATTRIBUTION,
    part: Literal["all", "image", "gene"] = "all",
    library: str | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    image: bool = True,
    whole: bool = False,
    size: float = 1.0,
    cmap: str = "RdBu_r",
    ax: Axes | Sequence[Axes] | NDArray[Any] | None = None,
) -> Axes | NDArray[Any]:
    """Draw what each spot added to the output of the asked spots, red for more and blue for less.

    The asked spots are ringed; spots that were not looked at are left out.

    Parameters
    ----------
    adata
        Object that :func:`stfm.tl.attribute` was run on.
    key
        What was ``key_added``.
    part
        ``"image"``: what tiles added; ``"gene"``: what counts added; ``"all"``: both.
    library
        Library to draw; by default all that hold asked spots, one panel each.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates; the first two are drawn.
    image
        Draw the H&E behind the spots, where there is one.
    whole
        Draw the whole slide instead of the part that was looked at.
    size
        Diameter of the spots, as a multiple of the true one.
    cmap
        Colour map, white in the middle.
    ax
        Axes to draw into, one a library.

    Returns
    -------
    The Axes; an array of them where several libraries are drawn.

    Raises
    ------
    MissingKeyError
        Nothing was attributed under that name, or not to that part; no such library.
    InputError
        The number of Axes does not fit, or nothing was looked at in the library.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "storm-tiny", epochs=1, stage="mask")
    >>> sf.tl.attribute(adata, model, target="ERBB2", spots=adata.obs_names[0], n_steps=5)
    >>> ax = sf.pl.attribution(adata, part="image")
    >>> ax.get_title()
    'ERBB2 (tiles)'
    """
    check_adata(adata)
    check_choice("part", part, _PARTS)
    values = _values(adata, key, part)
    places = ground(adata, library, library_key=library_key, spatial_key=spatial_key, image=image)
    places = [place for place in places if np.isfinite(values[place.rows]).any()]
    if not places:
        msg = f"no spot of library {library!r} was looked at; sf.tl.attribute(adata, ..., spots=...) names the spots."
        raise InputError(msg)
    record = adata.uns[key]
    asked = adata.obs_names.isin(record["spots"].index)
    axes = axes_for(len(places), ax)
    limit = max(float(np.nanmax(np.abs(values))), 1e-12)
    for axis, place in zip(axes, places, strict=True):
        title = f"{record['target']}{_OF[part]}"
        _panel(
            axis, place, values, asked, title=f"{place.name}: {title}" if len(places) > 1 else title, limit=limit,
            whole=whole, size=size, cmap=cmap,
        )  # fmt: skip
    single: Axes = axes[0]
    return single if len(axes) == 1 else axes


def _panel(
    ax: Axes,
    place: Ground,
    values: NDArray[np.float64],
    asked: NDArray[np.bool_],
    *,
    title: str,
    limit: float,
    whole: bool,
    size: float,
    cmap: str,
) -> None:
    seen = np.isfinite(values[place.rows])
    drawn = replace(place, rows=place.rows[seen], xy=place.xy[seen])
    stage(ax, place if whole else drawn, title=title, image_alpha=0.5)
    draw_values(
        ax, drawn, values[drawn.rows], cmap=cmap, limits=(-limit, limit), size=size, label="added to the output"
    )
    _rings(ax, drawn, drawn.xy[asked[drawn.rows]], size)


def _rings(ax: Axes, place: Ground, xy: NDArray[np.float64], size: float) -> None:
    from matplotlib.collections import EllipseCollection

    diameter = np.full(len(xy), 1.15 * place.diameter * size)
    rings = EllipseCollection(
        diameter, diameter, np.zeros(len(xy)), units="xy", offsets=xy, offset_transform=ax.transData,
        facecolors="none", edgecolors="black", linewidths=1.8, zorder=3,
    )  # fmt: skip
    ax.add_collection(rings)


def _values(adata: AnnData, key: str, part: str) -> NDArray[np.float64]:
    column = key if part == "all" else part_key(key, part)
    if key not in adata.uns or key not in adata.obs:
        msg = f"there is no attribution {key!r}; run stfm.tl.attribute(adata, model, ..., key_added={key!r}) first."
        raise MissingKeyError(msg)
    if column not in adata.obs:
        msg = f"the model read no {'H&E' if part == 'image' else 'counts'} for {key!r}; part='all' draws what it read."
        raise MissingKeyError(msg)
    values: NDArray[np.float64] = adata.obs[column].to_numpy(dtype=np.float64)
    return values
