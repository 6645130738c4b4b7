"""``pl.spatial_domains``: domains, or any other category, over the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import MissingKeyError
from stfm._keys import DOMAIN, SPATIAL
from stfm._validate import did_you_mean
from stfm.pl._spatial import axes_for, category_palette, check_adata, draw_categories, ground, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


def spatial_domains(
    adata: AnnData,
    key: str | Sequence[str] = DOMAIN,
    *,
    truth: str | None = None,
    library: str | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    image: bool = True,
    size: float = 1.0,
    alpha: float = 1.0,
    legend: bool = True,
    ax: Axes | Sequence[Axes] | NDArray[Any] | None = None,
) -> Axes | NDArray[Any]:
    """Draw spatial domains at the true size of the spots, over the H&E where there is one.

    Parameters
    ----------
    adata
        Object that :func:`stfm.tl.spatial_domains` was run on.
    key
        Column of ``obs`` with categories, or several, each in a panel of its own.
    truth
        Column with known domains: drawn first, and the ARI of each other column stands in its title. Found domains
        take the colour of the known domain that they overlap most.
    library
        Library to draw; all of them by default, each in a panel of its own.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates; the first two are drawn.
    image
        Draw the H&E behind the spots, where there is one.
    size
        Diameter of the spots, as a multiple of the true one.
    alpha
        Opacity of the spots.
    legend
        Whether the names of the domains stand beside each panel.
    ax
        Axes to draw into, one a panel; new ones by default.

    Returns
    -------
    The Axes, or an array of them where there are several panels (libraries one after the other).

    Raises
    ------
    MissingKeyError
        A column or a library does not exist.
    InputError
        The number of Axes does not fit.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> ax = sf.pl.spatial_domains(adata, "domain")
    """
    check_adata(adata)
    found = [key] if isinstance(key, str) else list(key)
    columns = {name: _categories(adata, name) for name in ([truth] if truth is not None else []) + found}
    places = ground(adata, library, library_key=library_key, spatial_key=spatial_key, image=image)
    panels = [(place, name) for place in places for name in columns]
    axes = axes_for(len(panels), ax, columns=max(len(columns), 1) if truth is not None else 4)
    palettes = _palettes(adata, columns, truth)
    for axis, (place, name) in zip(axes, panels, strict=True):
        title = place.name if name == DOMAIN and len(places) > 1 else name.replace("_", " ")
        if truth is not None and name != truth:
            title += f" (ARI {_ari(columns[truth][place.rows], columns[name][place.rows])})"
        stage(axis, place, title=title, image_alpha=0.45)
        draw_categories(axis, place, columns[name][place.rows], palettes[name], size=size, alpha=alpha, legend=legend)
    return axes[0] if len(panels) == 1 else axes


def _categories(adata: AnnData, key: str) -> pd.Categorical:
    import pandas as pd

    if key not in adata.obs:
        advice = " Run stfm.tl.spatial_domains(adata, n_domains) first." if key == DOMAIN else ""
        msg = f"adata.obs has no column {key!r}. {did_you_mean(key, map(str, adata.obs.columns))}{advice}"
        raise MissingKeyError(msg)
    column = adata.obs[key]
    named = [None if absent else str(value) for value, absent in zip(column, column.isna(), strict=True)]
    if isinstance(column.dtype, pd.CategoricalDtype):
        return pd.Categorical(named, categories=[str(c) for c in column.cat.categories])
    return pd.Categorical(named)


def _ari(truth: pd.Categorical, found: pd.Categorical) -> str:
    from stfm.metrics.domains import ari

    if (truth.codes < 0).all():
        return "unknown"
    return f"{ari(np.asarray(truth, dtype=object), np.asarray(found, dtype=object)):.2f}"


def _palettes(adata: AnnData, columns: dict[str, pd.Categorical], truth: str | None) -> dict[str, dict[str, str]]:
    """Return the colours of each column; beside a truth, domains borrow the colour of what they overlap most."""
    import pandas as pd

    palettes = {name: category_palette(adata, name, list(c.categories)) for name, c in columns.items()}
    if truth is None:
        return palettes
    from scipy.optimize import linear_sum_assignment

    from stfm._palette import category_colors

    for name, found in columns.items():
        if name == truth:
            continue
        overlap = pd.crosstab(np.asarray(found, dtype=object), np.asarray(columns[truth], dtype=object))
        rows, known = list(map(str, overlap.index)), list(map(str, overlap.columns))
        pairs = zip(*linear_sum_assignment(-overlap.to_numpy()), strict=True)
        matched = {rows[int(i)]: palettes[truth][known[int(j)]] for i, j in pairs}
        spare = iter(c for c in category_colors(20) if c not in set(palettes[truth].values()))
        names = [str(c) for c in found.categories]
        palettes[name] = {c: matched[c] if c in matched else next(spare, "#4B4B4B") for c in names}
    return palettes
