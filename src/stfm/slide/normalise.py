"""Whether a matrix holds raw counts, and the one normalisation that models see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from stfm._errors import InputError


def _values(part: Any) -> NDArray[Any]:
    """Return the stored values of a sparse block, or all values of a dense one."""
    is_sparse = bool(sparse.issparse(part))  # a plain bool: the stubs of SciPy narrow to a class without data
    return np.asarray(part.tocsr().data if is_sparse else part)


def check_counts(X: Any, *, where: str = "X", layers: Iterable[str] = (), block: int = 20_000) -> None:
    """Refuse a matrix that does not hold raw counts.

    Parameters
    ----------
    X
        Dense, sparse or backed matrix; read in blocks of rows.
    where
        Name for the message.
    layers
        Names of the layers that the object has, told in the message.
    block
        Rows read at once.

    Raises
    ------
    InputError
        Some value is nan, infinite, negative or no integer.
    """
    whole = sparse.issparse(X)
    step = max(1, X.shape[0]) if whole else block
    for start in range(0, X.shape[0], step):
        part: Any = X if whole else X[start : start + step]
        values = _values(part)
        if values.dtype.kind in "bu" or values.size == 0:
            continue
        low, high = values.min(), values.max()
        problem = None
        if not (np.isfinite(low) and np.isfinite(high)):
            problem = "holds nan or infinite values"
        elif low < 0:
            problem = f"holds negative values (down to {low:.4g}): it looks scaled or centred"
        elif values.dtype.kind == "f" and bool(np.any(values != np.rint(values))):
            kind = "log-normalised" if high < 30 else "normalised"
            problem = f"holds values that are no integers (largest {high:.4g}): it looks {kind}"
        if problem:
            have = ", ".join(f"'{name}'" for name in layers)
            raise InputError(
                f"{where} {problem}; raw counts are needed: name the layer that has them with layer="
                + (f" (layers here: {have})" if have else " (for example layer='counts')")
            )


def log_normalise(
    rows: sparse.csr_matrix | sparse.csr_array | NDArray[Any], total: ArrayLike, *, target_sum: float = 1e4
) -> Any:
    """Return ``log1p(target_sum * c / total)`` as float32, sparse for sparse input.

    Parameters
    ----------
    rows
        Counts ``(n, g)``; g may be fewer genes than were measured.
    total
        Counts of every row over ALL measured genes, ``(n,)``. Rows without counts stay zero.
    target_sum
        Counts a row is scaled to.
    """
    total = np.asarray(total, dtype=np.float64).ravel()
    if len(total) != rows.shape[0]:
        raise InputError(f"total has {len(total)} values for {rows.shape[0]} rows; give one a row")
    scale = (target_sum / np.where(total > 0, total, np.inf)).astype(np.float32)
    if sparse.issparse(rows):
        result: Any = sparse.csr_matrix(rows, dtype=np.float32, copy=True)
        result.data *= np.repeat(scale, np.diff(result.indptr))
        np.log1p(result.data, out=result.data)
        return result
    dense = np.multiply(rows, scale[:, None], dtype=np.float32)
    return np.log1p(dense, out=dense)
