"""Likelihoods of measured expression: negative binomial and Poisson on counts, Gaussian on log-normalised values.

Counts of a spot are whole numbers whose variance grows faster than their mean (cells differ, and a spot holds few), and
their sum says how deeply a spot was sequenced, not what it expresses. The negative binomial with the spot's total as
size factor says both, weighs a gene by what its counts can tell, and stays proper at the one or two counts that most
genes have; a Gaussian on log-normalised values treats the zeros of a shallow spot as measured absence.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIKELIHOODS", "counts_of", "expression_of_rate", "gaussian_nll", "negative_binomial_nll", "poisson_nll"]

LIKELIHOODS = ("nb", "poisson", "gaussian")

#: log-normalised values are ``log1p(1e4 c / sum c)``
TARGET_SUM = 1e4

_MAX_LOG_RATE = 12.0


def counts_of(log_normalised: Tensor, totals: Tensor) -> Tensor:
    """Return the counts ``c`` behind ``log1p(1e4 c / total)``; ``totals`` broadcasts against the spots."""
    return torch.expm1(log_normalised.float()) * (totals.float() / TARGET_SUM).unsqueeze(-1)


def expression_of_rate(log_rate: Tensor) -> Tensor:
    """Return ``log1p(1e4 rate)``, the log-normalised expression that a rate (share of a spot's counts) stands for."""
    return torch.log1p(TARGET_SUM * log_rate.clamp(max=0.0).exp())


def negative_binomial_nll(counts: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Return ``-log NB(c; μ, θ)``, variance ``μ + μ² / θ``, shapes broadcast.

    Parameters
    ----------
    counts
        c.
    log_mean
        log μ.
    log_dispersion
        log θ; large is Poisson.
    """
    log_mean = log_mean.float().clamp(max=_MAX_LOG_RATE)
    theta = log_dispersion.float().exp()
    # log(θ + μ) from the logarithms, so that neither may overflow nor vanish.
    log_sum = torch.logaddexp(log_dispersion.float(), log_mean)
    log_p = (
        torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1)
        + theta * (log_dispersion - log_sum) + counts * (log_mean - log_sum)
    )  # fmt: skip
    return -log_p


def poisson_nll(counts: Tensor, log_mean: Tensor) -> Tensor:
    """Return ``-log Poisson(c; μ)``."""
    log_mean = log_mean.float().clamp(max=_MAX_LOG_RATE)
    return log_mean.exp() - counts * log_mean + torch.lgamma(counts + 1)


def gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return ``-log N(x; mean, variance)`` without the constant ``log(2 π) / 2``."""
    return 0.5 * (log_variance + (x - mean).square() * (-log_variance).exp())
