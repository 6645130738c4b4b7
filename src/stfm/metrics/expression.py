"""Scores of predicted expression, gene by gene.

One word stands for one number here: ``scope`` says whether a correlation is taken inside each slide and then averaged,
or over all spots at once (which rewards a model for telling slides apart), and ``constant`` says what a gene without
variance counts. Nothing is averaged over NaN silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from scipy import sparse

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, resolve_rng
from stfm.slide.normalise import log_normalise

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

Scope = Literal["per_slide", "pooled"]
Constant = Literal["zero", "nan", "raise"]

# A column whose spread is below this share of its size is constant up to rounding.
_FLAT = 1e-7


def _pair(measured: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both tables as float64 ``(n, g)`` after checking that they belong together."""
    names = [list(t.columns) if hasattr(t, "columns") else None for t in (measured, predicted)]
    if names[0] is not None and names[1] is not None and names[0] != names[1]:
        msg = "measured and predicted have different columns; put the genes of both in one order first."
        raise InputError(msg)
    tables = []
    for name, table in (("measured", measured), ("predicted", predicted)):
        dense = cast("Any", table).toarray() if sparse.issparse(table) else table
        array = np.asarray(dense, dtype=np.float64)
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2 or array.shape[0] == 0:
            msg = f"{name} must be a table with a row a spot and a column a gene, got shape {array.shape}."
            raise InputError(msg)
        if not np.isfinite(array).all():
            msg = f"{name} holds nan or infinite values, which cannot be scored; drop those spots or genes first."
            raise InputError(msg)
        tables.append(array)
    if tables[0].shape != tables[1].shape:
        msg = f"measured has shape {tables[0].shape}, predicted {tables[1].shape}; they must agree."
        raise InputError(msg)
    return tables[0], tables[1]


def _by_slide(n: int, slides: ArrayLike | None, scope: Scope) -> Iterator[NDArray[np.int64]]:
    """Yield the rows over which one score is taken."""
    check_choice("scope", scope, ("per_slide", "pooled"))
    if slides is None or scope == "pooled":
        yield np.arange(n)
        return
    labels = np.asarray(slides).astype(str)
    if labels.shape != (n,):
        msg = f"slides must name the slide of each of the {n} spots, got shape {labels.shape}."
        raise InputError(msg)
    for name in dict.fromkeys(labels):
        yield np.flatnonzero(labels == name)


def _correlate(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson r of each column; NaN where either is constant."""
    norms = []
    centred = []
    for table in (a, b):
        middle = table.mean(axis=0)
        deviation = table - middle
        norm = np.sqrt((deviation**2).sum(axis=0))
        flat = norm <= _FLAT * np.sqrt(len(table)) * np.maximum(np.abs(middle), 1e-12)
        norms.append(np.where(flat, np.nan, norm))
        centred.append(deviation)
    r: NDArray[np.float64] = (centred[0] * centred[1]).sum(axis=0) / (norms[0] * norms[1])
    return np.clip(r, -1.0, 1.0)


def gene_pearson(
    measured: ArrayLike,
    predicted: ArrayLike,
    *,
    slides: ArrayLike | None = None,
    scope: Scope = "per_slide",
    constant: Constant = "zero",
) -> NDArray[np.float64]:
    """Pearson correlation of measured and predicted expression, gene by gene.

    Parameters
    ----------
    measured, predicted
        Tables ``(n, g)`` with a row a spot, in the same order of spots and genes.
    slides
        Slide of each spot; None takes all spots as one slide.
    scope
        ``"per_slide"``: r inside each slide, then the mean over slides. ``"pooled"``: one r over all spots, which
        also counts differences between slides.
    constant
        What a gene that is constant on either side counts: ``"zero"`` (a constant predicts nothing), ``"nan"`` (left
        out of the mean over slides; NaN where it is constant everywhere), or ``"raise"``.

    Returns
    -------
    Correlations, float64 ``(g,)``.

    Raises
    ------
    InputError
        Shapes or columns that do not agree, values that are not finite, or a constant gene under ``"raise"``.

    Examples
    --------
    >>> from stfm import metrics
    >>> measured = [[1.0, 5.0], [2.0, 3.0], [3.0, 4.0]]
    >>> predicted = [[1.5, 1.0], [2.5, 3.0], [3.5, 2.0]]
    >>> metrics.gene_pearson(measured, predicted)
    array([ 1., -1.])
    """
    check_choice("constant", constant, ("zero", "nan", "raise"))
    truth, guess = _pair(measured, predicted)
    r = np.stack([_correlate(truth[rows], guess[rows]) for rows in _by_slide(len(truth), slides, scope)])
    if constant == "zero":
        r = np.nan_to_num(r, nan=0.0)
    undefined = np.isnan(r)
    if constant == "raise" and undefined.any():
        msg = f"{int(undefined.any(axis=0).sum())} genes are constant in a slide; choose constant='zero' or 'nan'."
        raise InputError(msg)
    defined = (~undefined).sum(axis=0)
    mean: NDArray[np.float64] = np.full(r.shape[1], np.nan)
    np.divide(np.where(undefined, 0.0, r).sum(axis=0), defined, out=mean, where=defined > 0)
    return mean


def gene_mse(
    measured: ArrayLike, predicted: ArrayLike, *, slides: ArrayLike | None = None, scope: Scope = "per_slide"
) -> NDArray[np.float64]:
    """Mean squared error, gene by gene.

    Parameters
    ----------
    measured, predicted
        Tables ``(n, g)`` with a row a spot, in the same order of spots and genes.
    slides
        Slide of each spot; None takes all spots as one slide.
    scope
        ``"per_slide"`` gives each slide the same weight, ``"pooled"`` each spot.

    Returns
    -------
    Errors, float64 ``(g,)``.

    Examples
    --------
    >>> from stfm import metrics
    >>> measured = [[1.0, 5.0], [2.0, 3.0], [3.0, 4.0]]
    >>> predicted = [[1.5, 1.0], [2.5, 3.0], [3.5, 2.0]]
    >>> metrics.gene_mse(measured, predicted).round(2)
    array([0.25, 6.67])
    """
    truth, guess = _pair(measured, predicted)
    square = (truth - guess) ** 2
    per_slide = np.stack([square[rows].mean(axis=0) for rows in _by_slide(len(square), slides, scope)])
    error: NDArray[np.float64] = per_slide.mean(axis=0)
    return error


def thin(counts: Any, *, rng: int | np.random.Generator | None = 0) -> tuple[Any, Any]:
    """Split counts in two independent halves by binomial thinning.

    Parameters
    ----------
    counts
        Raw counts ``(n, g)``, dense or sparse.
    rng
        Seed or generator.

    Returns
    -------
    Two tables of the kind of ``counts`` that add up to it; each molecule went to either with probability 1/2.

    Examples
    --------
    >>> import numpy as np
    >>> from stfm import metrics
    >>> one, other = metrics.thin(np.full((1, 4), 100))
    >>> one + other
    array([[100., 100., 100., 100.]], dtype=float32)
    """
    generator = resolve_rng(rng)
    if sparse.issparse(counts):
        whole: Any = sparse.csr_matrix(cast("Any", counts), copy=True)
        first = whole.copy()
        first.data = generator.binomial(_integers(whole.data), 0.5).astype(np.float32)
        second = whole
        second.data = whole.data.astype(np.float32) - first.data
        return first, second
    dense = np.asarray(counts)
    half = generator.binomial(_integers(dense), 0.5).astype(np.float32)
    return half, dense.astype(np.float32) - half


def _integers(values: NDArray[Any]) -> NDArray[np.int64]:
    whole: NDArray[np.float64] = np.rint(values)
    if values.size and (not np.isfinite(values).all() or values.min() < 0 or not np.array_equal(whole, values)):
        msg = "thinning needs raw counts (integers, none negative); give the layer that holds them."
        raise InputError(msg)
    return whole.astype(np.int64)


def noise_ceiling(
    counts: Any,
    *,
    columns: ArrayLike | None = None,
    target_sum: float = 1e4,
    n_splits: int = 10,
    rng: int | np.random.Generator | None = 0,
) -> NDArray[np.float64]:
    r"""Largest Pearson r that counting noise leaves to a perfect prediction, gene by gene.

    The counts of one slide are thinned into two independent halves, each is normalised as the target is
    (``log1p(target_sum * c / sum c)``), and their correlation r over the spots is the reliability of half the counts.
    Spearman-Brown takes it to all counts, and the root is the correlation of the measured values with the noise-free
    ones: :math:`\sqrt{2 r / (1 + r)}`, 0 where r is negative. The mean over the splits is returned.
    Counting noise is only one reason why a prediction falls short, so 100 % of the ceiling is not physical.

    Parameters
    ----------
    counts
        Raw counts of one slide over all measured genes ``(n, g)``, dense or sparse.
    columns
        Genes to score (indices or mask); the size factors are always taken over all.
    target_sum
        Counts that a spot is scaled to.
    n_splits
        Number of random splits.
    rng
        Seed or generator.

    Returns
    -------
    Ceilings between 0 and 1, float64 ``(len(columns),)``.

    References
    ----------
    Spearman (1910) and Brown (1910), split-half reliability.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=200, image=False)
    >>> sf.metrics.noise_ceiling(adata.X, columns=[0, 1, 2]).round(2)
    array([0.88, 0.87, 0.79])
    """
    check_count("n_splits", n_splits)
    check_positive("target_sum", target_sum)
    generator = resolve_rng(rng)
    chosen = np.arange(counts.shape[1])[slice(None) if columns is None else np.asarray(columns)]
    ceilings = np.zeros(len(chosen))
    for _ in range(n_splits):
        halves = []
        for half in thin(counts, rng=generator):
            total = np.asarray(half.sum(axis=1)).ravel()
            values = log_normalise(half[:, chosen], total, target_sum=target_sum)
            halves.append(np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64))
        r = np.maximum(np.nan_to_num(_correlate(*halves), nan=0.0), 0.0)
        ceilings += np.sqrt(2 * r / (1 + r))
    return ceilings / n_splits


def expression_scores(
    measured: ArrayLike,
    predicted: ArrayLike,
    *,
    genes: ArrayLike | None = None,
    ceiling: ArrayLike | None = None,
    slides: ArrayLike | None = None,
) -> pd.DataFrame:
    """Return one row a gene: r inside the slides, r pooled, mean squared error, and the share of the noise ceiling.

    Parameters
    ----------
    measured, predicted
        Tables ``(n, g)`` with a row a spot.
    genes
        Names of the columns; taken from a DataFrame where one is given.
    ceiling
        Noise ceiling of each gene (:func:`noise_ceiling`).
    slides
        Slide of each spot.

    Returns
    -------
    DataFrame with columns ``r`` (per slide, constant = 0), ``r_pooled``, ``mse``, and with a ceiling ``ceiling`` and
    ``share`` (NaN where the ceiling is 0).

    Examples
    --------
    >>> from stfm import metrics
    >>> measured = [[1.0, 5.0], [2.0, 3.0], [3.0, 4.0]]
    >>> predicted = [[1.5, 1.0], [2.5, 3.0], [3.5, 2.0]]
    >>> list(metrics.expression_scores(measured, predicted).columns)
    ['r', 'r_pooled', 'mse']
    """
    import pandas as pd

    names = genes if genes is not None else getattr(measured, "columns", getattr(predicted, "columns", None))
    table = pd.DataFrame(
        {
            "r": gene_pearson(measured, predicted, slides=slides),
            "r_pooled": gene_pearson(measured, predicted, slides=slides, scope="pooled"),
            "mse": gene_mse(measured, predicted, slides=slides),
        },
        index=None if names is None else pd.Index(np.asarray(names), name="gene"),
    )
    if ceiling is not None:
        top = np.asarray(ceiling, dtype=np.float64)
        if top.shape != (len(table),):
            msg = f"ceiling has shape {top.shape} for {len(table)} genes; give one value a gene."
            raise InputError(msg)
        table["ceiling"] = top
        table["share"] = np.divide(table["r"], top, out=np.full(len(top), np.nan), where=top > 0)
    return table
