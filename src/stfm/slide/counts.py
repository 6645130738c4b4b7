"""Raw counts of a slide, in memory or on disk, read by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_BLOCK = 4096


class Counts:
    """Rows of a count matrix that may lie in memory (dense or sparse) or on disk (a backed AnnData).

    Parameters
    ----------
    matrix
        What is indexed by row: an array, a SciPy sparse matrix, or a dataset of a backed AnnData.
    rows
        Rows of ``matrix`` that belong to the slide, in the order of its spots; all by default.
    """

    def __init__(self, matrix: Any, rows: ArrayLike | None = None) -> None:
        self._matrix = matrix
        self._rows = np.arange(matrix.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        self._totals: NDArray[np.float32] | None = None
        self._in_memory: sparse.csr_matrix | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Spots, genes."""
        return len(self._rows), int(self._matrix.shape[1])

    @property
    def is_backed(self) -> bool:
        """Whether the counts lie on disk."""
        return not (isinstance(self._matrix, np.ndarray) or sparse.issparse(self._matrix))

    def subset(self, indices: ArrayLike) -> Counts:
        """Return the counts of some spots, without a copy."""
        return Counts(self._matrix, self._rows[np.asarray(indices)])

    def rows(self, indices: ArrayLike) -> sparse.csr_matrix:
        """Return the counts of some spots, float32 CSR, in the order asked for."""
        index = np.asarray(indices, dtype=np.int64)
        if not self.is_backed:
            return self.to_csr()[index]
        # Files are read best in rising order and refuse repeats: read each row once, then put in order.
        wanted, order = np.unique(self._rows[index], return_inverse=True)
        return _csr(self._matrix[wanted])[order]

    def to_csr(self) -> sparse.csr_matrix:
        """Return all counts, float32 CSR (kept, so that later calls are free; a backed matrix is read whole)."""
        if self.is_backed:
            return self.rows(np.arange(len(self._rows)))
        if self._in_memory is None:
            whole = np.array_equal(self._rows, np.arange(self._matrix.shape[0]))
            self._in_memory = _csr(self._matrix if whole else self._matrix[self._rows])
        return self._in_memory

    def all_zero(self) -> bool:
        """Whether nothing was counted at all; what lies on disk is read no further than to the first count."""
        n = len(self._rows)
        return not any(self.rows(np.arange(i, min(i + _BLOCK, n))).data.any() for i in range(0, n, _BLOCK))

    def totals(self) -> NDArray[np.float32]:
        """Return the sum of counts of each spot over all measured genes, float32 ``(n,)``."""
        if self._totals is None:
            parts = [
                np.asarray(self.rows(np.arange(start, min(start + _BLOCK, len(self._rows)))).sum(axis=1)).ravel()
                for start in range(0, len(self._rows), _BLOCK)
            ]
            self._totals = np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)
        return self._totals


def _csr(matrix: Any) -> sparse.csr_matrix:
    """Return a matrix as float32 CSR without a copy where it is one already."""
    result = sparse.csr_matrix(matrix)
    return result if result.dtype == np.float32 else result.astype(np.float32)
