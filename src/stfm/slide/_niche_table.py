"""The table of neighbours, and its two sparse matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from stfm._errors import InputError
from stfm.slide._threads import n_threads, run

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ENTRIES = 2**31  # of one table
_INLINE = 2**20  # entries that are copied faster than threads start


@dataclass(frozen=True)
class NicheTable:
    """The neighbours of every spot, in rows.

    Attributes
    ----------
    index
        Positions of the neighbours, int32 ``(n, k)``, the nearest first and ties by index; -1 where a spot has fewer.
    distance
        Their distances, float32 ``(n, k)``, in the unit of the coordinates; inf where a spot has fewer.
    """

    index: NDArray[np.int32]
    distance: NDArray[np.float32]

    @property
    def n_obs(self) -> int:
        """Number of spots."""
        return len(self.index)

    @property
    def k(self) -> int:
        """Number of columns: the largest number of neighbours asked for or found."""
        return int(self.index.shape[1])

    @property
    def degree(self) -> NDArray[np.int64]:
        """Number of neighbours of each spot, ``(n,)``."""
        return np.asarray((self.index >= 0).sum(axis=1), dtype=np.int64)

    @property
    def mean_degree(self) -> float:
        """Mean number of neighbours."""
        return float(self.degree.mean()) if self.n_obs else 0.0

    def scaled(self, factor: float) -> NicheTable:
        """Return the table in another unit, such as µm for px times µm/px."""
        return NicheTable(self.index, np.multiply(self.distance, factor, dtype=np.float32))

    def to_csr(self, *, copy: bool = True) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Return connectivities (weight 1) and distances, float32 CSR ``(n, n)``, neighbours in their order.

        A neighbour at distance 0 is a stored zero in the distances. With ``copy=False`` the distances may share the
        memory of the table.
        """
        there = self.index >= 0
        n, k = self.index.shape
        if there.all():
            indptr = np.arange(0, n * k + 1, max(k, 1), dtype=np.int32 if n * k < 2**31 else np.int64)
            if k == 0:
                indptr = np.zeros(n + 1, np.int32)
            indices, data = self.index.reshape(-1), self.distance.reshape(-1)
            if copy:
                indices, data = indices.copy(), data.copy()
        else:
            indptr = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
            indices, data = self.index[there], self.distance[there]
        ones, columns = np.empty(len(indices), np.float32), np.empty_like(indices)

        def fill(lo: int, hi: int) -> None:
            ones[lo:hi] = 1.0
            columns[lo:hi] = indices[lo:hi]

        run(fill, len(indices), n_threads(), inline=_INLINE)
        return _csr(ones, columns, indptr.copy(), n), _csr(data, indices, indptr, n)

    @classmethod
    def from_csr(cls, connectivities: sp.csr_matrix, distances: sp.csr_matrix) -> NicheTable:
        """Return the table that two matrices hold, also after spots were taken out or rows were sorted by column."""
        graph = sp.csr_matrix(connectivities)
        weight = sp.csr_matrix(distances)
        n = graph.shape[0]
        if graph.shape != weight.shape or graph.shape[1] != n:
            msg = f"connectivities {graph.shape} and distances {weight.shape} must be square and of one shape."
            raise InputError(msg)
        row = np.repeat(np.arange(n), np.diff(graph.indptr))
        same = np.array_equal(graph.indptr, weight.indptr) and np.array_equal(graph.indices, weight.indices)
        # zeros may have been dropped from the distances, as scipy does in arithmetic
        d = weight.data if same else np.asarray(weight[row, graph.indices]).reshape(-1)
        d = d.astype(np.float32)
        if same and len(d) and not ((np.diff(d) < 0) & (np.diff(row) == 0)).any():
            order = np.arange(len(d))
        else:
            order = np.lexsort((graph.indices, d, row))
        degree = np.diff(graph.indptr)
        k = int(degree.max(initial=0))
        index = np.full((n, k), -1, np.int32)
        distance = np.full((n, k), np.inf, np.float32)
        column = np.arange(len(row)) - np.repeat(graph.indptr[:-1], degree)
        index[row, column] = graph.indices[order]
        distance[row, column] = d[order]
        return cls(index, distance)


def _csr(data: NDArray[np.float32], indices: NDArray[np.int32], indptr: NDArray[np.int32], n: int) -> sp.csr_matrix:
    """Return a CSR matrix that keeps the order of its rows."""
    return sp.csr_matrix((data, indices, indptr), shape=(n, n), copy=False)


def check_coords(coords: ArrayLike, *, where: str = "coords") -> NDArray[np.float64]:
    """Return coordinates as float64 ``(n, 2 or 3)`` or say what is wrong with them."""
    points = np.ascontiguousarray(coords, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        msg = f"{where} must have the shape (spots, 2) or (spots, 3), got {points.shape}."
        raise InputError(msg)
    if not np.isfinite(points).all():
        bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
        msg = f"{where} has {len(bad)} rows that are nan or infinite (the first is row {bad[0]}); remove these spots."
        raise InputError(msg)
    if len(points) >= 2**31:
        msg = f"{where} has {len(points)} rows, more than the 2**31 - 1 of an int32 index; split the libraries."
        raise InputError(msg)
    return points


def empty_table(n: int, width: int, *, blank: bool = True) -> NicheTable:
    """Return a table to write into, with no neighbours in it if `blank`."""
    if n * width > _MAX_ENTRIES:
        msg = (
            f"a table of {n} spots with up to {width} neighbours each does not fit in memory. "
            "Take a smaller radius=, pass n_neighbors= beside it, or ties='index'."
        )
        raise InputError(msg)
    if not blank:
        return NicheTable(np.empty((n, width), np.int32), np.empty((n, width), np.float32))
    return NicheTable(np.full((n, width), -1, np.int32), np.full((n, width), np.inf, np.float32))


def widened(table: NicheTable, width: int) -> NicheTable:
    """Return the table with room for more neighbours."""
    wide = empty_table(table.n_obs, width)
    wide.index[:, : table.k], wide.distance[:, : table.k] = table.index, table.distance
    return wide


def trimmed(table: NicheTable) -> NicheTable:
    """Return the table without columns that no spot uses."""
    k = int(table.degree.max(initial=0))
    return NicheTable(np.ascontiguousarray(table.index[:, :k]), np.ascontiguousarray(table.distance[:, :k]))


def with_self(table: NicheTable) -> NicheTable:
    """Return the table with every point as its own first neighbour."""
    own = np.arange(table.n_obs, dtype=np.int32)[:, None]
    zero = np.zeros((table.n_obs, 1), np.float32)
    return NicheTable(np.hstack([own, table.index]), np.hstack([zero, table.distance]))
