"""``pl.embedding``: the embedding in two dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stfm._errors import InputError, MissingKeyError
from stfm._keys import DOMAIN, EMBEDDING
from stfm._palette import MISSING
from stfm._validate import check_choice, check_positive, did_you_mean
from stfm.get._embedding import embedding as read_embedding
from stfm.pl._spatial import axes_for, category_palette, check_adata, legend_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


def embedding(
    adata: AnnData,
    color: str | None = None,
    *,
    part: Literal["joint", "image", "gene", "niche"] = "joint",
    key: str = EMBEDDING,
    layout: Literal["pca", "umap"] = "pca",
    size: float | None = None,
    cmap: str = "viridis",
    rng: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the spots by their embedding, in two dimensions.

    Parameters
    ----------
    adata
        Object that :func:`stfm.tl.embed` was run on.
    color
        Column of ``obs`` that gives the colours (categories or numbers), or a gene; by default the spatial domains
        where there are any.
    part
        ``"joint"``, or the part of one modality.
    key
        What was ``key_added``.
    layout
        ``"pca"`` (the two leading principal components, with their share of the variance) or ``"umap"``.
    size
        Area of a point in points squared; by default it falls with the number of spots.
    cmap
        Colour map of numbers.
    rng
        Seed of ``"umap"``.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    The Axes.

    Raises
    ------
    MissingKeyError
        There is no such embedding, part or column.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "st-align-tiny", epochs=1)
    >>> sf.tl.embed(adata, model)
    >>> ax = sf.pl.embedding(adata, "domain")
    """
    check_adata(adata)
    check_choice("layout", layout, ("pca", "umap"))
    table = read_embedding(adata, part=part, key=key).to_numpy(dtype=np.float64)
    bad = ~np.isfinite(table).all(axis=1)
    if bad.all() or len(table) < 3:
        msg = f"the {part} part of {key!r} holds fewer than three finite rows; there is nothing to draw."
        raise InputError(msg)
    values = _colors(adata, color)
    points, names = _layout(table[~bad], layout, rng)
    area = float(np.clip(12000 / len(points), 3, 40)) if size is None else size
    check_positive("size", area)
    axis: Axes = axes_for(1, ax)[0]
    # A fixed order at random, so that no category covers another because it came last.
    order = np.random.default_rng(0).permutation(len(points))
    _scatter(axis, adata, points[order], values, np.flatnonzero(~bad)[order], area, cmap)
    axis.set_xlabel(names[0], fontsize=9)
    axis.set_ylabel(names[1], fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    shown = "" if values is None else f", {str(values.name).replace('_', ' ')}"
    axis.set_title(f"{part} embedding{shown}", fontsize=10)
    return axis


def _layout(table: NDArray[np.float64], layout: str, rng: int) -> tuple[NDArray[np.float64], list[str]]:
    if layout == "umap":
        import anndata as ad
        import scanpy as sc

        graph = ad.AnnData(obsm={"rep": table.astype(np.float32)}, shape=(len(table), 0))
        sc.pp.neighbors(graph, n_neighbors=min(15, len(table) - 1), use_rep="rep", random_state=rng)
        sc.tl.umap(graph, random_state=rng)
        return np.asarray(graph.obsm["X_umap"], dtype=np.float64), ["UMAP 1", "UMAP 2"]
    centred = table - table.mean(axis=0)
    _, scale, right = np.linalg.svd(centred, full_matrices=False)
    share = scale**2 / max(float((scale**2).sum()), 1e-300)
    points = centred @ right[:2].T
    if points.shape[1] == 1:
        points = np.column_stack([points, np.zeros(len(points))])
    return points, [f"PC {i + 1} ({s:.0%} of variance)" for i, s in enumerate([*share[:2], 0.0][:2])]


def _colors(adata: AnnData, color: str | None) -> pd.Series | None:
    """Return the values that give the colours; None paints all spots alike."""
    import pandas as pd

    if color is None:
        color = DOMAIN
        if DOMAIN not in adata.obs:
            return None
    if color in adata.obs:
        column: pd.Series = adata.obs[color]
        return column
    if color in adata.var_names:
        return pd.Series(adata.obs_vector(color), index=adata.obs_names, name=color)
    msg = f"{color!r} is neither a column of obs nor a gene. {did_you_mean(color, map(str, adata.obs.columns))}"
    raise MissingKeyError(msg)


def _scatter(
    ax: Axes,
    adata: AnnData,
    points: NDArray[np.float64],
    values: pd.Series | None,
    rows: NDArray[np.intp],
    area: float,
    cmap: str,
) -> None:
    import pandas as pd

    style: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": len(points) > 20_000}
    x, y = points[:, 0], points[:, 1]
    if values is None:
        ax.scatter(x, y, color=category_palette(adata, "", ["spots"])["spots"], **style)
        return
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        drawn = ax.scatter(x, y, c=values.to_numpy(dtype=np.float64)[rows], cmap=cmap, **style)
        bar = ax.figure.colorbar(drawn, ax=ax, shrink=0.7, pad=0.02, aspect=22)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=2)
        return
    labels = pd.Categorical([None if absent else str(v) for v, absent in zip(values, values.isna(), strict=True)])
    if isinstance(values.dtype, pd.CategoricalDtype):
        labels = labels.set_categories([str(c) for c in values.cat.categories])
    palette = category_palette(adata, str(values.name), list(labels.categories))
    taken = np.asarray(labels, dtype=object)[rows]
    ax.scatter(x, y, c=[palette.get(str(name), MISSING) for name in taken], **style)
    legend_of(ax, taken, palette)
