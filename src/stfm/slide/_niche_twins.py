"""Plain NumPy twins of the compiled searches and means: slow, short, and what the tests compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm.slide._niche_mean import check_mean
from stfm.slide._niche_table import NicheTable, check_coords, empty_table, with_self

if TYPE_CHECKING:
    import scipy.sparse as sp
    from numpy.typing import ArrayLike, NDArray


def knn_numpy(
    coords: ArrayLike,
    n_neighbors: int | None = 3,
    *,
    radius: float | None = None,
    include_self: bool = False,
    groups: ArrayLike | None = None,
    ties: str = "index",
    tie_tolerance: float = 0.0,
) -> NicheTable:
    """Do what :func:`knn` does point by point over all others: what the tests compare with.

    Parameters
    ----------
    coords, n_neighbors, radius, include_self, groups, ties, tie_tolerance
        As for :func:`knn`, the tolerance given as a number.

    Returns
    -------
    Index and distance of the neighbours.
    """
    points = check_coords(coords)
    n = len(points)
    label = np.zeros(n, np.intp) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    limit2 = np.inf if radius is None else radius**2 * (1 + 1e-12)
    rows: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []
    for i in range(n):
        d2 = np.zeros(n)
        for axis in range(points.shape[1]):
            d2 += (points[:, axis] - points[i, axis]) ** 2
        near = np.flatnonzero((label == label[i]) & (d2 <= limit2))
        near = near[near != i]
        near = near[np.lexsort((near, d2[near]))]
        if n_neighbors is not None and len(near) > n_neighbors:
            near = _cut(near, d2[near], n_neighbors, tie_tolerance, ties == "all")
        rows.append((near, d2[near]))
    k = max([0, *(len(near) for near, _ in rows)])
    table = empty_table(n, k if n_neighbors is None or ties == "all" else n_neighbors)
    for i, (near, d2) in enumerate(rows):
        table.index[i, : len(near)], table.distance[i, : len(near)] = near, np.sqrt(d2)
    return with_self(table) if include_self else table


def _cut(
    near: NDArray[np.intp],
    d2: NDArray[np.float64],
    k: int,
    tolerance: float,
    keep_all: bool,  # noqa: FBT001
) -> NDArray[np.intp]:
    """Return who stays: all shells before that of the k-th neighbour, and of that one all or the lowest indices."""
    start = stop = 0
    while stop < k:
        start = stop
        shell = (np.sqrt(d2[start]) + tolerance) ** 2 if tolerance > 0 else d2[start]
        stop = int(np.searchsorted(d2, shell, side="right"))
    if keep_all:
        return near[:stop]
    last = near[start:stop]
    return np.concatenate([near[:start], last[np.isin(last, np.sort(last)[: k - start])]])


def niche_mean_numpy(
    counts: sp.csr_matrix | sp.csr_array, table: NicheTable, rows: ArrayLike | None = None
) -> NDArray[np.float32]:
    """Do what :func:`niche_mean` does with dense rows: what the tests compare with.

    Parameters
    ----------
    counts, table, rows
        As for :func:`niche_mean`.

    Returns
    -------
    Means, float32 ``(len(rows), g)``.
    """
    asked = check_mean(counts, table, rows)
    dense = counts.toarray().astype(np.float32)
    niches = [table.index[i][table.index[i] >= 0] for i in asked]
    means = [dense[niche].mean(axis=0) if len(niche) else dense[i] for i, niche in zip(asked, niches, strict=True)]
    return np.asarray(means, np.float32).reshape(len(asked), counts.shape[1])
