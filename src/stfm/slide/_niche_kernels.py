"""Compiled loops shared by the two neighbour searches.

Every kernel works on a range of rows and releases the interpreter lock, so that plain Python threads run them side by
side (`stfm.slide._threads`). No numba threading layer is started: its layers forbid either concurrent callers or forked
data-loader workers, and both are met in training.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from stfm.slide._prefetch import prefetch_to_write

njit = numba.njit(nogil=True, cache=True)


class Rule(NamedTuple):
    """Which candidates make a niche.

    The `k` nearest at a squared distance of at most `limit2`; distances that differ by at most `tolerance` are a tie,
    which is kept whole (`keep_all`) or filled up by lowest index.
    """

    k: int
    limit2: float
    tolerance: float
    keep_all: bool


@njit
def insert(d2s: NDArray[np.float64], ids: NDArray[np.int32], m: int, d2: float, i: int) -> int:
    """Put candidate `i` into the list sorted by (squared distance, index); return how many it holds."""
    if m < d2s.shape[0]:
        m += 1
    p = m - 1
    while p > 0 and (d2s[p - 1] > d2 or (d2s[p - 1] == d2 and ids[p - 1] > i)):
        d2s[p] = d2s[p - 1]
        ids[p] = ids[p - 1]
        p -= 1
    d2s[p] = d2
    ids[p] = i
    return m


@njit
def reach(d2s: NDArray[np.float64], m: int, k: int, tolerance: float, limit2: float) -> float:
    """Squared distance beyond which nothing can matter any more to a list of `m` candidates."""
    if m < k:
        return limit2
    far = d2s[k - 1]
    if tolerance > 0.0:
        far = (np.sqrt(far) + tolerance) ** 2
    return float(min(far, limit2))


@njit
def write_row(
    d2s: NDArray[np.float64],
    ids: NDArray[np.int32],
    m: int,
    k: int,
    tolerance: float,
    keep_all: bool,  # noqa: FBT001
    index: NDArray[np.int32],
    distance: NDArray[np.float32],
) -> bool:
    """Choose the niche among the sorted candidates and write it; False where the list was too short to know.

    Distances that differ by at most `tolerance` from the first of their shell are a tie. The shell that holds the k-th
    neighbour is kept whole (`keep_all`) or filled up by lowest index.
    """
    capacity = d2s.shape[0]
    if m <= k:
        for t in range(m):
            index[t] = ids[t]
            distance[t] = np.sqrt(d2s[t])
        return bool(m < capacity or capacity == k)
    if tolerance == 0.0 and not keep_all:
        for t in range(k):
            index[t] = ids[t]
            distance[t] = np.sqrt(d2s[t])
        return True
    start = 0
    stop = 0
    while stop < k:
        start = stop
        shell = d2s[start]
        if tolerance > 0.0:
            shell = (np.sqrt(shell) + tolerance) ** 2
        while stop < m and d2s[stop] <= shell:
            stop += 1
    if stop == m and m == capacity:
        return False
    places = (stop if keep_all else k) - start
    t = 0
    for c in range(stop):
        if c >= start and places < stop - start:
            lower = 0
            for other in range(start, stop):
                lower += ids[other] < ids[c]
            if lower >= places:
                continue
        index[t] = ids[c]
        distance[t] = np.sqrt(d2s[c])
        t += 1
    return True


@njit
def expect(rows: NDArray[np.int32], p: int, index: NDArray[np.int32], distance: NDArray[np.float32]) -> None:
    """Fetch the row of a table where the niche of position `p` will be written."""
    width = np.int64(index.shape[1])
    first = np.int64(rows[p]) * width
    flat, flat_distance = index.reshape(-1), distance.reshape(-1)
    prefetch_to_write(flat, first)
    prefetch_to_write(flat_distance, first)
    prefetch_to_write(flat, first + width - 1)
    prefetch_to_write(flat_distance, first + width - 1)
