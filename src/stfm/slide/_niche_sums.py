"""Compiled sums over the sparse rows of a niche.

The rows of a niche lie far apart in memory. While one is added, the next but one is fetched, a cache line at a time:
that takes half the time, since the processor cannot guess where the next row begins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stfm.slide._niche_kernels import njit
from stfm.slide._prefetch import prefetch

_AHEAD = 2  # rows
_LINE = 16  # entries of 4 bytes in a cache line


@njit
def add_row(
    data: NDArray[np.float32],
    columns: NDArray[np.int32],
    lo: int,
    hi: int,
    ahead: int,
    stop: int,
    target: NDArray[np.float32],
) -> None:
    """Add the entries lo..hi to a dense row, and fetch the entries ahead..stop meanwhile."""
    p = lo
    while p < hi:
        end = min(p + _LINE, hi)
        if ahead < stop:
            prefetch(data, ahead)
            prefetch(columns, ahead)
            ahead += _LINE
        # unsigned positions spare numba's test for negative ones, a third of the time
        for q in range(np.uint64(p), np.uint64(end)):
            target[np.uint64(columns[q])] += np.float32(data[q])
        p = end


@njit
def mean_rows(
    data: NDArray[np.float32],
    columns: NDArray[np.int32],
    indptr: NDArray[np.int32],
    index: NDArray[np.int32],
    rows: NDArray[np.int64],
    lo: int,
    hi: int,
    out: NDArray[np.float32],
) -> None:
    """Mean expression over the niche of each row (paper eq. 2), written densely; an empty niche is the spot itself."""
    k = index.shape[1]
    for b in range(lo, hi):
        target = out[b]
        target[:] = 0.0
        size = 0
        for t in range(k):
            ahead, stop = 0, 0
            c = b + (t + _AHEAD) // k
            if c < hi:
                later = index[rows[c], (t + _AHEAD) % k]
                if later >= 0:
                    ahead, stop = indptr[later], indptr[later + 1]
            i = index[rows[b], t]
            if i >= 0:
                size += 1
                add_row(data, columns, indptr[i], indptr[i + 1], ahead, stop, target)
        if size == 0:
            add_row(data, columns, indptr[rows[b]], indptr[rows[b] + 1], 0, 0, target)
        elif size > 1:
            # a division, not a product with 1/n: equal rows then give exactly their own values
            divisor = np.float32(size)
            for g in range(target.shape[0]):
                target[g] /= divisor
