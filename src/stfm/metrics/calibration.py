"""Whether predicted deviations have the size of the errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri

from stfm._errors import InputError
from stfm.metrics.expression import _pair

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

__all__ = ["coverage"]

#: name of the row over all genes
OVERALL = "overall"


def coverage(
    measured: ArrayLike,
    mean: ArrayLike,
    sd: ArrayLike,
    *,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    genes: ArrayLike | None = None,
) -> pd.DataFrame:
    """Share of measured values inside the central normal intervals of a prediction.

    An interval of level 0.8 reaches 1.28 deviations to either side of the mean. Where deviations have the size of the
    errors, it holds 80 % of the measured values; with fewer in it, the prediction is surer than it should be.

    Parameters
    ----------
    measured, mean, sd
        Tables ``(n, g)`` with a row a spot, in the same order of spots and genes: what was measured, what was
        predicted, and the predicted deviations (``obsm["predicted_expression_sd"]``).
    levels
        Levels of the intervals, between 0 and 1.
    genes
        Names of the columns; taken from a DataFrame where one is given.

    Returns
    -------
    DataFrame with a row a gene and a last row ``"overall"``, a column a level: shares, float64.

    Raises
    ------
    InputError
        Tables that do not agree, values that are not finite, a deviation that is not positive, or a level that is none.

    Examples
    --------
    >>> import numpy as np
    >>> from stfm import metrics
    >>> measured = np.random.default_rng(0).normal(2.0, 0.5, (1000, 2))
    >>> metrics.coverage(measured, np.full((1000, 2), 2.0), np.full((1000, 2), 0.5)).loc["overall"].round(2).tolist()
    [0.5, 0.8, 0.96]
    """
    import pandas as pd

    truth, guess = _pair(measured, mean)
    _, spread = _pair(mean, sd)
    if not (spread > 0).all():
        msg = (
            f"sd must be positive everywhere, got {spread.min():g}; a deviation of 0 claims a prediction without error."
        )
        raise InputError(msg)
    asked = _levels(levels)
    away = np.abs(truth - guess) / spread
    inside = np.stack([(away <= reach).mean(axis=0) for reach in ndtri(0.5 + asked / 2)], axis=1)
    names = genes if genes is not None else getattr(measured, "columns", getattr(mean, "columns", None))
    rows = list(range(truth.shape[1])) if names is None else [str(name) for name in np.asarray(names)]
    if len(rows) != truth.shape[1]:
        msg = f"genes names {len(rows)} columns, the tables have {truth.shape[1]}."
        raise InputError(msg)
    table = np.concatenate([inside, inside.mean(axis=0, keepdims=True)])  # each gene has as many spots
    return pd.DataFrame(table, index=pd.Index([*rows, OVERALL], name="gene"), columns=pd.Index(asked, name="level"))


def _levels(levels: Sequence[float]) -> NDArray[np.float64]:
    asked = np.asarray(levels, dtype=np.float64)
    if asked.ndim != 1 or asked.size == 0 or not ((asked > 0) & (asked < 1)).all():
        msg = f"levels must be numbers between 0 and 1, got {levels!r}."
        raise InputError(msg)
    return asked
