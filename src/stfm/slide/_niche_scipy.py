"""Exact neighbours through scipy's k-d tree: for few points, where loading compiled code takes longer than the search.

Ties and radius are judged as the compiled searches judge them, on the same squared distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm.slide._niche_table import NicheTable, empty_table, trimmed, widened

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from scipy.spatial import cKDTree

    Found = tuple[NDArray[np.int64], NDArray[np.float64]]

FEW = 50_000  # points below which a search takes less time than to load compiled code
_MOST = 512  # candidates of a point; where more are tied the compiled searches need less memory


def search(
    coords: NDArray[np.float64],
    k: int | None,
    limit2: float,
    keep_all: bool,  # noqa: FBT001
    tolerance: float | Callable[[NDArray[np.float32]], float],
    sample: NDArray[np.intp],
    threads: int,
) -> tuple[NicheTable, float] | None:
    """Search all points; None where too many candidates would have to be held.

    Parameters
    ----------
    coords
        Points, at least one.
    k, limit2, keep_all
        Neighbours (None for all), largest squared distance, whether ties are kept whole.
    tolerance
        Difference at which distances are equal, or what tells it from the nearest distances of the sample.
    sample
        Points that are asked first: they show how many candidates settle nearly all niches.
    threads
        Threads.

    Returns
    -------
    The table, and the tolerance.
    """
    from scipy.spatial import cKDTree

    n, asked = len(coords), k or 0
    tree = cKDTree(coords)
    held = min(2 * asked + 16, n)
    ids, d2 = _candidates(tree, coords, sample, held, threads)
    equal = tolerance if isinstance(tolerance, float) else tolerance(np.sqrt(d2[:, 0]).astype(np.float32))
    need = _reach(d2, k, limit2, equal)
    held = min(max(int((d2 <= need[:, None]).sum(axis=1).max(initial=0)), asked) + 2, n)
    ragged = k is None or keep_all
    table = empty_table(n, held if ragged else asked)
    rows: NDArray[np.intp] = tree.indices  # in its order, which spares the cache
    while len(rows):
        ids, d2 = _candidates(tree, coords, rows, held, threads)
        # scipy's distances may differ from these by a rounding error
        sure = (
            (d2[:, held - 2] > _reach(d2, k, limit2, equal) * (1 + 1e-9)) if 1 < held < n else np.ones(len(ids), bool)
        )
        if ragged and held > table.k:
            table = widened(table, held)
        _write(table, rows[sure], ids[sure], d2[sure], k, limit2, keep_all, equal)
        rows, held = rows[~sure], min(2 * held, n)
        if len(rows) and held > _MOST:
            return None
    return (trimmed(table) if ragged else table), equal


def _candidates(tree: cKDTree, coords: NDArray[np.float64], rows: NDArray[np.intp], held: int, threads: int) -> Found:
    """Return the nearest points of some points, sorted by squared distance and index, themselves last at inf."""
    ids = np.asarray(tree.query(coords[rows], np.arange(1, held + 1), workers=threads if len(rows) > 2**12 else 1)[1])
    d2 = np.zeros(ids.shape)
    for axis in range(coords.shape[1]):
        d2 += (coords[ids, axis] - coords[rows, axis][:, None]) ** 2
    own = ids == rows[:, None]
    d2[own] = np.inf
    if own[:, 0].all():
        ids, d2 = np.roll(ids, -1, axis=1), np.roll(d2, -1, axis=1)
    mixed = np.flatnonzero((d2[:, 1:] <= d2[:, :-1]).any(axis=1))
    order = np.lexsort((ids[mixed], d2[mixed]))
    ids[mixed], d2[mixed] = (np.take_along_axis(part[mixed], order, axis=1) for part in (ids, d2))
    return ids, d2


def _reach(d2: NDArray[np.float64], k: int | None, limit2: float, tolerance: float) -> NDArray[np.float64]:
    """Return the squared distance beyond which nothing matters to a niche."""
    if k is None or k > d2.shape[1]:
        return np.full(len(d2), limit2)
    far = d2[:, k - 1]
    return np.minimum((np.sqrt(far) + tolerance) ** 2 if tolerance > 0 else far, limit2)


def _write(
    table: NicheTable,
    rows: NDArray[np.intp],
    ids: NDArray[np.int64],
    d2: NDArray[np.float64],
    k: int | None,
    limit2: float,
    keep_all: bool,  # noqa: FBT001
    tolerance: float,
) -> None:
    """Choose the niches among sorted candidates and write them."""
    there = (d2 <= limit2) & (d2 < np.inf)
    if k is not None and tolerance == 0 and not keep_all:
        ids, d2, there = ids[:, :k], d2[:, :k], there[:, :k]
        width = ids.shape[1]
        table.index[rows, :width] = np.where(there, ids, -1)
        table.distance[rows, :width] = np.where(there, np.sqrt(d2), np.inf)
        return
    keep = there if k is None else there & _kept(ids, np.where(there, d2, np.inf), k, keep_all, tolerance)
    row, column = np.nonzero(keep)
    place = (np.cumsum(keep, axis=1) - 1)[row, column]
    table.index[rows[row], place] = ids[row, column]
    table.distance[rows[row], place] = np.sqrt(d2[row, column])


def _kept(
    ids: NDArray[np.int64],
    d2: NDArray[np.float64],
    k: int,
    keep_all: bool,  # noqa: FBT001
    tolerance: float,
) -> NDArray[np.bool_]:
    """Return who stays: the shells before that of the k-th neighbour, and of that one all or the lowest indices."""
    if d2.shape[1] <= k:
        return np.ones(d2.shape, bool)
    shell = np.zeros(d2.shape, np.int64)
    start = d2[:, 0]
    for c in range(1, d2.shape[1]):
        border = (np.sqrt(start) + tolerance) ** 2 if tolerance > 0 else start
        shell[:, c] = shell[:, c - 1] + (d2[:, c] > border)
        start = np.where(d2[:, c] > border, d2[:, c], start)
    last = shell[:, k - 1 : k]
    if keep_all:
        return np.asarray(shell <= last)
    rank = np.where((shell == last) & (d2 < np.inf), ids, np.iinfo(np.int64).max)
    places = k - (shell < last).sum(axis=1)
    highest = np.take_along_axis(np.sort(rank, axis=1), places[:, None] - 1, axis=1)
    return np.asarray((shell < last) | (rank <= highest))
