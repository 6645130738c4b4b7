"""``pl.predicted_expression``: predicted beside measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import MissingKeyError
from stfm._keys import PREDICTED, SPATIAL
from stfm._validate import did_you_mean
from stfm.pl._spatial import axes_for, check_adata, draw_values, ground, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stfm.pl._spatial import Ground

_SCALE = "log1p(counts per 10⁴)"
_TITLE = 36  # letters that fit above a panel


def predicted_expression(
    adata: AnnData,
    gene: str | Sequence[str],
    *,
    key: str = PREDICTED,
    layer: str | None = None,
    library: str | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    image: bool = True,
    size: float = 1.0,
    cmap: str = "viridis",
    same_scale: bool = False,
    ax: Axes | Sequence[Axes] | NDArray[Any] | None = None,
) -> Axes | NDArray[Any]:
    """Draw predicted expression beside the measured, with their correlation.

    The title of a prediction says "slide seen" or "patient seen" where the predictor was fitted on that slide, or on
    others of its patient: the correlation is then no test.

    Parameters
    ----------
    adata
        Object that :func:`stfm.tl.predict_expression` was run on.
    gene
        A gene, or several: one row of panels each.
    key
        What was ``key_added``.
    layer
        Layer with the measured counts; None takes ``X``. Normalised as the prediction is, over all genes.
    library
        Library to draw; all of them by default, one row of panels each.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates; the first two are drawn.
    image
        Draw the H&E behind the spots, where there is one.
    size
        Diameter of the spots, as a multiple of the true one.
    cmap
        Colour map.
    same_scale
        Whether both panels share the measured range; by default each shows its own, since a prediction varies less
        than noisy counts.
    ax
        Axes to draw into: two a gene and library (measured, predicted), or one where the gene was not measured.

    Returns
    -------
    An array of Axes ``(rows, 2)``; a single Axes where one gene that was not measured is drawn.

    Raises
    ------
    MissingKeyError
        Nothing was predicted under that name, or not that gene; no such library or layer.
    InputError
        The number of Axes does not fit.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, n_patients=2, mpp=4.0)
    >>> known = adata[adata.obs["patient"] == "patient_1"].copy()
    >>> new = adata[adata.obs["patient"] == "patient_2"].copy()
    >>> sf.tl.predict_expression(new, reference=known, genes=["ERBB2", "MUC1"], rings=0, tile_px=64)
    >>> axes = sf.pl.predicted_expression(new, "ERBB2")
    >>> axes[0, 0].get_title()
    'ERBB2 measured'
    """
    check_adata(adata)
    genes = [gene] if isinstance(gene, str) else list(gene)
    predicted = _predicted(adata, genes, key)
    measured = {name: _measured(adata, name, layer) for name in genes}
    seen = _seen(adata, key)
    places = ground(adata, library, library_key=library_key, spatial_key=spatial_key, image=image)
    panels = [
        (name, place, kind)
        for name in genes
        for place in places
        for kind in (("measured", "predicted") if measured[name] is not None else ("predicted",))
    ]
    paired = all(values is not None for values in measured.values())
    axes = axes_for(len(panels), ax, columns=2 if paired else 1)
    for axis, (name, place, kind) in zip(axes, panels, strict=True):
        truth = measured[name]
        _panel(
            axis, place, kind, name, None if truth is None else truth[place.rows], predicted[name][place.rows],
            size=size, cmap=cmap, same_scale=same_scale, several=len(places) > 1, seen=seen.get(place.name, ""),
        )  # fmt: skip
    single: Axes = axes[0]
    if len(panels) == 1:
        return single
    return axes.reshape(-1, 2) if paired else axes


def _panel(
    ax: Axes,
    place: Ground,
    kind: str,
    gene: str,
    truth: NDArray[np.float64] | None,
    guess: NDArray[np.float64],
    *,
    size: float,
    cmap: str,
    same_scale: bool,
    several: bool,
    seen: str,
) -> None:
    values = truth if kind == "measured" and truth is not None else guess
    title = f"{place.name}: {gene} {kind}" if several else f"{gene} {kind}"
    notes = []
    if kind == "predicted" and truth is not None:
        notes.append(f"r = {_correlation(truth, guess):.2f}")
    if kind == "predicted" and seen:
        notes.append(f"({seen})")
    if notes:
        note = " ".join(notes)
        title += f", {note}" if len(title) + len(note) < _TITLE else f"\n{note}"
    limits = _limits(truth if same_scale and truth is not None else values)
    stage(ax, place, title=title, image_alpha=0.35)
    draw_values(ax, place, values, cmap=cmap, limits=limits, size=size, label=_SCALE)


def _seen(adata: AnnData, key: str) -> dict[str, str]:
    """Return the libraries that the predictor was fitted on, or whose patient it knew: no test, and marked as such."""
    record = adata.uns.get(key, {})
    names = [str(name) for name in record.get("libraries", ())]
    words: dict[str, str] = {}
    for entry, word in (("patient_seen_in_training", "patient seen"), ("seen_in_training", "slide seen")):
        words |= {name: word for name, seen in zip(names, record.get(entry, ()), strict=False) if seen}
    return words


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the range that is shown: without the outermost hundredth, which would take all the colours."""
    low, high = np.percentile(values, [1, 99])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _correlation(truth: NDArray[np.float64], guess: NDArray[np.float64]) -> float:
    from stfm.metrics.expression import gene_pearson

    return float(gene_pearson(truth, guess)[0])


def _predicted(adata: AnnData, genes: list[str], key: str) -> dict[str, NDArray[np.float64]]:
    if key not in adata.obsm:
        msg = f"adata.obsm has no {key!r}; run stfm.tl.predict_expression(adata, ..., key_added={key!r}) first."
        raise MissingKeyError(msg)
    table: Any = adata.obsm[key]
    for gene in genes:
        if gene not in table.columns:
            msg = f"{gene!r} was not predicted. {did_you_mean(gene, map(str, table.columns))}"
            raise MissingKeyError(msg)
    return {gene: table[gene].to_numpy(dtype=np.float64) for gene in genes}


def _measured(adata: AnnData, gene: str, layer: str | None) -> NDArray[np.float64] | None:
    """Return ``log1p(1e4 c / sum c)`` of a gene, or None where it was not measured."""
    if layer is not None and layer not in adata.layers:
        msg = f"adata.layers has no {layer!r}. {did_you_mean(layer, map(str, adata.layers))}"
        raise MissingKeyError(msg)
    counts: Any = adata.X if layer is None else adata.layers[layer]
    if counts is None or gene not in adata.var_names:
        return None
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    column = counts[:, [adata.var_names.get_loc(gene)]]
    values = np.asarray(column.sum(axis=1), dtype=np.float64).ravel()  # of one column: dense and sparse alike
    normal: NDArray[np.float64] = np.log1p(1e4 * values / np.where(total > 0, total, 1.0))
    return normal
