"""Two views of the same thing brought together without negatives (VICReg)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["VICRegTerms", "vicreg_terms"]

_EPS = 1e-4


@dataclass(frozen=True)
class VICRegTerms:
    """The three terms, scalars: distance of the views, lack of spread, correlation of the components."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_terms(first: Tensor, second: Tensor) -> VICRegTerms:
    """Return the terms of VICReg for two views, ``(b, d)`` each, summed over the views as published.

    Parameters
    ----------
    first, second
        Rows are the same tiles seen in two ways.

    References
    ----------
    Bardes, Ponce and LeCun 2022, arXiv:2105.04906, eqs. 1-5.
    """
    views = [view - view.mean(dim=0) for view in (first, second)]
    variance = torch.stack([F.relu(1.0 - (view.var(dim=0) + _EPS).sqrt()).mean() for view in views]).mean()
    covariance = torch.stack([_off_diagonal(view) for view in views]).sum()
    return VICRegTerms(F.mse_loss(first, second), variance, covariance)


def _off_diagonal(view: Tensor) -> Tensor:
    """Return the sum of the squared covariances of different components, over their number."""
    n, d = view.shape
    covariance = view.T @ view / max(1, n - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / d
