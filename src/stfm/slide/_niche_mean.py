"""Mean expression of niches, a batch of dense rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from stfm._errors import InputError, WrongTypeError
from stfm.slide._threads import n_threads, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from stfm.slide._niche_table import NicheTable

_PIECE = 64  # rows that a thread takes at a time, so that none waits long for another


def niche_mean(
    counts: sp.csr_matrix | sp.csr_array,
    table: NicheTable,
    rows: ArrayLike | None = None,
    *,
    out: NDArray[np.float32] | None = None,
    transform: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    n_jobs: int | None = None,
) -> NDArray[np.float32]:
    """Average the expression over the niches of some spots (eq. 2): p_i = (1 / |S_i|) sum over j in S_i of q_j.

    Only the rows asked for are made dense. Pass the same ``out`` for every batch and nothing is allocated.

    Parameters
    ----------
    counts
        Expression of all spots, CSR ``(n, g)``.
    table
        Their niches. A spot with an empty niche is its own niche.
    rows
        Positions of the spots; None for all of them, which takes ``n * g * 4`` bytes.
    out
        float32 array of at least ``(len(rows), g)``, C-contiguous, to write into.
    transform
        Applied to the result, such as ``np.log1p``.
    n_jobs
        Threads; None for all.

    Returns
    -------
    Means, float32 ``(len(rows), g)``; the first rows of ``out`` where it was given.

    Raises
    ------
    WrongTypeError
        ``counts`` is not a CSR matrix.
    InputError
        Shapes that do not fit each other.
    """
    from stfm.slide._niche_sums import mean_rows

    asked = check_mean(counts, table, rows)
    n, g = len(asked), counts.shape[1]
    if out is None:
        out = np.empty((n, g), np.float32)
    elif out.ndim != 2 or len(out) < n or out.shape[1] != g or out.dtype != np.float32 or not out.flags.c_contiguous:
        msg = f"out must be C-contiguous float32 of at least ({n}, {g}), got {out.dtype} {out.shape}."
        raise InputError(msg)
    result = out[:n]

    def work(lo: int, hi: int) -> None:
        mean_rows(counts.data, counts.indices, counts.indptr, table.index, asked, lo, hi, result)

    run(work, n, n_threads(n_jobs), parts=min(max(n // _PIECE, 1), 16), inline=_PIECE)
    return result if transform is None else transform(result)


def check_mean(counts: sp.csr_matrix | sp.csr_array, table: NicheTable, rows: ArrayLike | None) -> NDArray[np.int64]:
    """Return the rows as positions, once all shapes fit."""
    if not sp.issparse(counts) or counts.format != "csr":
        kind = f"{counts.format} matrix" if sp.issparse(counts) else type(counts).__name__
        msg = f"counts must be a CSR matrix, got a {kind}; use scipy.sparse.csr_matrix(counts)."
        raise WrongTypeError(msg)
    n = counts.shape[0]
    if n != table.n_obs:
        msg = f"counts have {n} rows and the niche table {table.n_obs}; build the niches of these spots."
        raise InputError(msg)
    asked = np.arange(n) if rows is None else np.atleast_1d(np.asarray(rows, dtype=np.int64))
    if len(asked) and (asked.min() < 0 or asked.max() >= n):
        msg = f"rows must lie between 0 and {n - 1}, got {asked.min()} to {asked.max()}."
        raise InputError(msg)
    return asked
