"""Rings of neighbours around every spot, and means over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from stfm._validate import check_count
from stfm.slide.niches import knn, lattice_tolerance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["ring_graphs", "ring_means"]

#: ring i ends at i + this many pitches: 6 and 12 spots on a hexagonal lattice, 8 and 12 on a square one
_MARGIN = 0.5
#: where there is no lattice: neighbours of ring 1; ring i has i times as many, as on a hexagonal one
_FIRST_RING = 6


def ring_graphs(coords: ArrayLike, n_rings: int = 1, *, groups: ArrayLike | None = None) -> list[sparse.csr_matrix]:
    """Return who lies in which ring around whom.

    On a lattice ring ``i`` holds the spots farther than ring ``i - 1`` and not farther than ``i + 0.5`` pitches; the
    border of the tissue has fewer. Elsewhere it holds the next ``6 i`` nearest.

    Parameters
    ----------
    coords
        Coordinates ``(n, 2)`` or ``(n, 3)``, any unit.
    n_rings
        Number of rings.
    groups
        Library of each spot; rings never cross libraries.

    Returns
    -------
    One 0/1 matrix a ring, CSR float32 ``(n, n)``; the spot itself is in none.
    """
    check_count("n_rings", n_rings)
    points = np.asarray(coords, dtype=np.float64)
    labels = (
        np.zeros(len(points), np.int64) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    entries: list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = [[] for _ in range(n_rings)]
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        for ring, (i, j) in enumerate(_rings_of(points[own], n_rings)):
            entries[ring].append((own[i], own[j]))
    graphs = []
    for parts in entries:
        rows, columns = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        shape = (len(points), len(points))
        graphs.append(sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape))
    return graphs


def _rings_of(points: NDArray[np.float64], n_rings: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the pairs (spot, neighbour) of each ring of one library."""
    empty = np.zeros(0, np.int64)
    if len(points) < 2:
        return [(empty, empty)] * n_rings
    nearest = knn(points, 1).distance[:, 0]
    if lattice_tolerance(nearest) > 0:
        pitch = float(np.median(nearest))
        table = knn(points, None, radius=(n_rings + _MARGIN) * pitch)
        ring = np.maximum(np.ceil(table.distance / pitch - _MARGIN), 1)
    else:
        table = knn(points, min(_FIRST_RING * n_rings * (n_rings + 1) // 2, len(points) - 1))
        rank = np.arange(table.k)
        last = np.cumsum(_FIRST_RING * np.arange(1, n_rings + 1))
        ring = np.broadcast_to(np.searchsorted(last, rank, side="right") + 1, table.index.shape)
    there = table.index >= 0
    spots = np.broadcast_to(np.arange(len(points))[:, None], table.index.shape)
    masks = [there & (ring == i) for i in range(1, n_rings + 1)]
    return [(spots[m].astype(np.int64), table.index[m].astype(np.int64)) for m in masks]


def ring_means(
    values: NDArray[np.floating], graph: sparse.csr_matrix, *, with_self: bool = False
) -> NDArray[np.float32]:
    """Return the mean of the neighbours' values, float32 ``(n, f)``; a spot without neighbours keeps its own.

    Parameters
    ----------
    values
        One row a spot.
    graph
        0/1 matrix of neighbours, as of :func:`ring_graphs`.
    with_self
        Whether the spot itself counts as one of its neighbours.
    """
    own = np.asarray(values, dtype=np.float32)
    linked = graph + sparse.identity(len(own), dtype=np.float32, format="csr") if with_self else graph
    degree = np.asarray(linked.sum(axis=1)).ravel()
    mean = np.asarray(linked @ own) / np.maximum(degree, 1)[:, None].astype(np.float32)
    return np.where(degree[:, None] > 0, mean, own).astype(np.float32, copy=False)
