"""Leading principal components of a table, on any device and the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_components"]

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
    # A sign that does not depend on the solver: the largest loading is positive.
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return singular[:rank] / len(z) ** 0.5, vectors * largest.sign()
