"""``pl.calibration``: whether predicted deviations have the size of the errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import InputError, MissingKeyError
from stfm._keys import PREDICTED, deviation_key
from stfm._palette import CATEGORIES
from stfm._validate import did_you_mean
from stfm.pl._expression import _seen
from stfm.pl._spatial import axes_for, check_adata

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_LEVELS = np.linspace(0.05, 0.95, 19)
_MARKED = (0.5, 0.8, 0.95)


def calibration(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    key: str = PREDICTED,
    layer: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many measured values lie in the intervals of a prediction, against how many should.

    On the diagonal the predicted deviations have the size of the errors; below it the prediction is surer than it
    should be, above it less sure. The title says "slide seen" or "patient seen" where the model was trained on that
    slide or patient: its errors on others are larger.

    Parameters
    ----------
    adata
        Object with raw counts that :func:`stfm.tl.predict_expression` was run on with a model that writes expression
        (``obsm[key + "_sd"]``).
    genes
        Genes to count, by default all that were predicted and measured.
    key
        What was ``key_added``.
    layer
        Layer with the measured counts; None takes ``X``. Normalised as the prediction is, over all genes.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    The Axes: nominal against found coverage over all genes, a band that holds 80 % of the genes, and the diagonal.

    Raises
    ------
    MissingKeyError
        Nothing was predicted under that name, or without deviations; no such gene or layer.
    InputError
        There are no counts, or none of the genes was measured.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, n_patients=2, mpp=4.0)
    >>> known = adata[adata.obs["patient"] == "patient_1"].copy()
    >>> new = adata[adata.obs["patient"] == "patient_2"].copy()
    >>> model = sf.tl.train(known, "storm-tiny", epochs=1, stage="mask")
    >>> sf.tl.predict_expression(new, model=model)
    >>> ax = sf.pl.calibration(new)
    >>> ax.get_xlabel()
    'nominal coverage'
    """
    from stfm.metrics.calibration import OVERALL, coverage

    check_adata(adata)
    mean, spread = _predicted(adata, key)
    chosen = _chosen(adata, mean, [genes] if isinstance(genes, str) else genes)
    measured = _measured(adata, chosen, layer)
    table = coverage(measured, mean[chosen].to_numpy(), spread[chosen].to_numpy(), levels=[*_LEVELS, *_MARKED])
    axis: Axes = axes_for(1, ax, inches=(4.4, 4.0))[0]
    curve = table.iloc[:, : len(_LEVELS)]
    axis.plot([0, 1], [0, 1], "--", color="0.6", linewidth=1.0, zorder=1)
    if len(chosen) > 1:
        low, high = np.percentile(curve.iloc[:-1].to_numpy(), [10, 90], axis=0)
        axis.fill_between(
            _LEVELS, low, high, color=CATEGORIES[0], alpha=0.2, linewidth=0, label=f"80 % of {len(chosen)} genes"
        )
    found = curve.loc[OVERALL].to_numpy()
    axis.plot(_LEVELS, found, color=CATEGORIES[0], linewidth=2.0, label="all genes" if len(chosen) > 1 else chosen[0])
    _mark(axis, table.loc[OVERALL].to_numpy()[len(_LEVELS) :])
    _finish(axis, sorted(set(_seen(adata, key).values())))
    return axis


def _mark(ax: Axes, found: NDArray[np.float64]) -> None:
    """Write the found coverage of the levels that people quote."""
    ax.plot(_MARKED, found, "o", color=CATEGORIES[0], markersize=5, zorder=3)
    for level, value in zip(_MARKED, found, strict=True):
        ax.annotate(
            f"{100 * level:.0f} %: {100 * value:.0f} %", (level, value), xytext=(6, -9), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip


def _finish(ax: Axes, seen: list[str]) -> None:
    ax.set_xlim(0, 1.12)
    ax.set_ylim(0, 1.02)
    ax.set_aspect("equal")
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("nominal coverage", fontsize=9)
    ax.set_ylabel("measured values inside", fontsize=9)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    ax.set_title(f"calibration ({', '.join(seen)})" if seen else "calibration", fontsize=10)


def _predicted(adata: AnnData, key: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    beside = deviation_key(key)
    for name in (key, beside):
        if name not in adata.obsm:
            why = "" if name == key else f" (of a model that writes expression; {key!r} has no deviations)"
            msg = (
                f"adata.obsm has no {name!r}; run stfm.tl.predict_expression(adata, model=..., key_added={key!r}){why}."
            )
            raise MissingKeyError(msg)
    mean: Any = adata.obsm[key]
    spread: Any = adata.obsm[beside]
    return mean, spread


def _chosen(adata: AnnData, mean: pd.DataFrame, genes: Sequence[str] | None) -> list[str]:
    """Return the genes that are counted: predicted and measured."""
    predicted = [str(name) for name in mean.columns]
    for gene in genes or ():
        for where, names in (("predicted", predicted), ("measured", [str(name) for name in adata.var_names])):
            if gene not in names:
                msg = f"{gene!r} was not {where}. {did_you_mean(gene, names)}"
                raise MissingKeyError(msg)
    known = set(adata.var_names)
    chosen = list(genes) if genes is not None else [name for name in predicted if name in known]
    if not chosen:
        msg = "none of the predicted genes was measured in adata, so there is nothing to compare."
        raise InputError(msg)
    return chosen


def _measured(adata: AnnData, genes: list[str], layer: str | None) -> NDArray[np.float64]:
    """Return ``log1p(1e4 c / sum c)`` of some genes."""
    if layer is not None and layer not in adata.layers:
        msg = f"adata.layers has no {layer!r}. {did_you_mean(layer, map(str, adata.layers))}"
        raise MissingKeyError(msg)
    counts: Any = adata.X if layer is None else adata.layers[layer]
    if counts is None:
        msg = "adata has no counts (X is None) to compare the prediction with; name a layer with layer=."
        raise InputError(msg)
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).reshape(-1, 1)
    columns = counts[:, adata.var_names.get_indexer(genes)]
    values = np.asarray(columns.toarray() if hasattr(columns, "toarray") else columns, dtype=np.float64)
    normal: NDArray[np.float64] = np.log1p(1e4 * values / np.where(total > 0, total, 1.0))
    return normal
