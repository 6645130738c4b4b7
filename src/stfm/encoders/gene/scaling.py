"""Genes on one scale, with statistics taken from the training slides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stfm._validate import check_choice

STANDARDISE = ("zscore", "centre", "none")
CLIP = 10.0
SMALLEST = 0.05


def masked_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation a gene over the spots that measured it, ``(G,)`` each; unmeasured: 0, 1."""
    x = x.double()
    if mask is None:
        return x.mean(dim=0), x.std(dim=0, correction=0)
    kept = mask.expand_as(x).double()
    n = kept.sum(dim=0).clamp_min(1.0)
    mean = (x * kept).sum(dim=0) / n
    deviation = (((x - mean).square() * kept).sum(dim=0) / n).sqrt()
    return mean, torch.where(kept.sum(dim=0) > 0, deviation, 1.0)


class GeneScaler(nn.Module):
    """``(x - mean) / deviation`` a gene; a gene that was not measured becomes 0, its training mean.

    Parameters
    ----------
    n_genes
        G.
    standardise
        ``"zscore"``; ``"centre"`` (the mean alone); ``"none"`` (as it is: an unmeasured gene counts as zero).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_genes: int, standardise: str = "zscore") -> None:
        super().__init__()
        self.standardise = check_choice("standardise", standardise, STANDARDISE)
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the statistics from ``x``, ``(n, G)``."""
        if self.standardise == "none":
            return
        mean, deviation = masked_moments(x, mask)
        self.mean.copy_(mean)
        if self.standardise == "zscore":
            # Genes that hardly vary would be pure noise at unit variance.
            self.scale.copy_(deviation.clamp_min(SMALLEST))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, G)``."""
        if self.standardise != "none":
            x = (x - self.mean) / self.scale
        if self.standardise == "zscore":
            x = x.clamp(-CLIP, CLIP)
        return x if mask is None else x * mask
