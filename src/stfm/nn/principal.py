"""Leading directions of a table, by variance or by what neighbours share; on any device, the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_components", "shared_components"]

OVERSAMPLING = 16
ITERATIONS = 10


def leading_components(z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return deviations of the scores and the leading right singular vectors, by seeded subspace iteration."""
    size = min(rank + OVERSAMPLING, *z.shape)
    basis = _start(z, size)
    for _ in range(ITERATIONS):
        basis, _r = torch.linalg.qr(z.T @ (z @ basis))
    _, singular, directions = torch.linalg.svd(z @ basis, full_matrices=False)
    vectors = (basis @ directions.T).T[:rank]
    return singular[:rank] / len(z) ** 0.5, _signed(vectors)


def shared_components(z: Tensor, graph: Tensor, rank: int, *, own: float) -> tuple[Tensor, Tensor]:
    """Return the directions along which neighbours are alike, and the deviations of what they share along them.

    They are the leading eigenvectors of ``Zᵀ (W + own I) Z / n``: the covariance of neighbours, with a share of the
    variance of single rows beside it (spatial components of Dray et al., 2008; there ``own`` is 0). Noise, which
    neighbours do not share, has little place in them.

    Parameters
    ----------
    z
        Centred rows, ``(n, g)``.
    graph
        W: which rows are neighbours, symmetric and sparse, its entries summing to n.
    rank
        Number of directions.
    own
        Weight of the variance of single rows.

    References
    ----------
    Dray, Saïd and Débias, Spatial ordination of vegetation data using a generalization of Wartenberg's multivariate
    spatial correlation, Journal of Vegetation Science 19, 2008.
    """

    def covariance(basis: Tensor) -> Tensor:
        scores = z @ basis
        return z.T @ (graph @ scores + own * scores) / len(z)

    size = min(rank + OVERSAMPLING, *z.shape)
    basis = _start(z, size)
    for _ in range(ITERATIONS):
        basis, _r = torch.linalg.qr(covariance(basis))
    small = basis.T @ covariance(basis)
    value, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = value.argsort(descending=True)[:rank]
    return value[order].clamp_min(0.0).sqrt(), _signed((basis @ vectors[:, order]).T)


def _start(z: Tensor, size: int) -> Tensor:
    """Return the seeded directions that iteration starts from."""
    return torch.randn(z.shape[1], size, generator=torch.Generator().manual_seed(0)).to(z)


def _signed(vectors: Tensor) -> Tensor:
    """Give each direction a sign that does not depend on the solver: its largest loading is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign()
