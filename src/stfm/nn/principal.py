"""Leading directions of a table, by variance or by what neighbours share; on any device, the same every time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["leading_components", "shared_components"]

OVERSAMPLING = 16
ITERATIONS = 10


def leading_components(z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return deviations of the scores and the leading right singular vectors, by seeded subspace iteration."""
    size = min(rank + OVERSAMPLING, *z.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(z.shape[1], size, generator=generator).to(z)
    for _ in range(ITERATIONS):
        basis, _r = torch.linalg.qr(z.T @ (z @ basis))
    _, singular, directions = torch.linalg.svd(z @ basis, full_matrices=False)
    vectors = (basis @ directions.T).T[:rank]
    return singular[:rank] / len(z) ** 0.5, _signed(vectors)


def shared_components(z: Tensor, graph: Tensor, rank: int, *, single: float) -> tuple[Tensor, Tensor]:
    """Return the directions along which neighbours are alike, and the square roots of their eigenvalues.

    They are the leading eigenvectors of ``Zᵀ (W + single I) Z / n``: the covariance of neighbours, with a share of the
    variance of single rows beside it (spatial components of Dray et al., 2008; there ``single`` is 0). Noise, which
    neighbours do not share, has little place in them.

    Parameters
    ----------
    z
        Centred rows, ``(n, g)``; a matrix of ``(g, g)`` is made of them.
    graph
        W: which rows are neighbours, symmetric and sparse ``(n, n)``, its entries summing to n.
    rank
        Number of directions, less than g.
    single
        Weight of the variance of single rows.

    Returns
    -------
    ``(rank,)``, 0 where neighbours are unlike, and ``(rank, g)``.

    References
    ----------
    Dray, Saïd and Débias, Spatial ordination of vegetation data using a generalization of Wartenberg's multivariate
    spatial correlation, Journal of Vegetation Science 19, 2008.
    """
    from scipy.sparse.linalg import eigsh

    covariance = (z.T @ (graph @ z + single * z)).double().numpy() / len(z)
    # Not by subspace iteration, which finds those that are largest in size: neighbours may be unlike, too.
    value, vectors = eigsh((covariance + covariance.T) / 2, k=rank, which="LA", v0=np.ones(z.shape[1]))
    order = np.argsort(-value)
    found = torch.from_numpy(np.ascontiguousarray(vectors[:, order].T)).to(z.dtype)
    return torch.from_numpy(value[order]).to(z.dtype).clamp_min(0.0).sqrt(), _signed(found)


def _signed(vectors: Tensor) -> Tensor:
    """Give each direction a sign that does not depend on the solver: its largest loading is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign()
