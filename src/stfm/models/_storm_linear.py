"""A closed-form companion of STORM's expression decoder: reduced-rank regression on the image features of a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from stfm.nn.ridge import ALPHAS, Basis, Choice, choose, held_out, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["WindowRegression", "window_features"]

#: spots nearer than this many typical steps are the inner ring (the diagonal of a square lattice is 1.41)
_INNER = 1.5
#: the step is the median distance to so many nearest spots
_NEAREST = 4
_COMPONENTS = 256
RANKS = (None, 3, 6, 12, 24)
#: genes by whose correlation penalty and rank are chosen
_CHOSEN_BY = 250


def window_features(features: Tensor, xy_um: Tensor, present: Tensor) -> Tensor:
    """Return the middle's features beside their means over the inner and the outer ring of the window, ``(b, 3 f)``.

    Parameters
    ----------
    features
        ``(b, w, f)``, the middle first.
    xy_um
        ``(b, w, 2)`` or ``(b, w, 3)``.
    present
        bool ``(b, w)``.
    """
    middle = features[:, 0]
    others = present.clone()
    others[:, 0] = False
    distance = (xy_um - xy_um[:, :1]).square().sum(dim=-1).sqrt()
    near = distance.masked_fill(~others, float("inf")).sort(dim=1).values[:, :_NEAREST]
    step = torch.where(near.isfinite(), near, float("nan")).nanmedian(dim=1, keepdim=True).values.nan_to_num(0.0)
    inner = others & (distance <= _INNER * step)
    parts = [middle]
    for ring in (inner, others & ~inner):
        weight = ring.to(features.dtype)
        mean = torch.einsum("bw,bwf->bf", weight, features) / weight.sum(dim=1, keepdim=True).clamp_min(1.0)
        parts.append(torch.where(ring.any(dim=1, keepdim=True), mean, middle))
    return torch.cat(parts, dim=1)


class WindowRegression(nn.Module):
    """Ridge on principal components, its rank reduced, from :func:`window_features` to log-normalised expression.

    Penalty and rank are chosen by leaving out one training section after the other.

    Parameters
    ----------
    width
        f, features of a spot.
    n_genes
        G.
    standardise
        Whether the features have scales of their own; off for principal components.
    """

    centre: Tensor
    left: Tensor
    weights: Tensor
    intercept: Tensor
    deviation: Tensor
    fitted: Tensor

    def __init__(self, width: int, n_genes: int, *, standardise: bool = False) -> None:
        super().__init__()
        self.standardise = standardise
        self.register_buffer("centre", torch.zeros(3 * width))
        # Two thin matrices: their rank is what was chosen, at most that of the components.
        self.register_buffer("left", torch.zeros(3 * width, _COMPONENTS))
        self.register_buffer("weights", torch.zeros(_COMPONENTS, n_genes))
        self.register_buffer("intercept", torch.zeros(n_genes))
        self.register_buffer("deviation", torch.ones(n_genes))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, x: Sequence[Tensor], y: Sequence[Tensor], coords: Sequence[NDArray[np.float64]]) -> None:
        """Fit on the spots of training sections.

        Parameters
        ----------
        x
            :func:`window_features` of each section, ``(n_i, 3 f)``.
        y
            Log-normalised expression of each section, ``(n_i, G)``; 0 where a gene was not measured.
        coords
            Of each section; with one section only, blocks of it are left out.
        """
        folds = held_out([len(part) for part in x], coords)
        features = torch.cat(list(x)).float().cpu().numpy()
        goal = torch.cat(list(y)).double().cpu().numpy()
        chosen = np.sort(np.argsort(-goal.var(axis=0), kind="stable")[:_CHOSEN_BY])
        bases = [Basis.of(features[train], _COMPONENTS, standardise=self.standardise) for train, _ in folds]
        grid = Choice.grid([_COMPONENTS], ALPHAS, RANKS)
        choice = choose(features, goal[:, chosen], folds, bases, grid)
        self.deviation.copy_(torch.from_numpy(_residual(features, goal, folds, bases, choice)))
        basis = Basis.of(features, _COMPONENTS, standardise=self.standardise)
        weights, intercept = solve(basis, goal, choice)
        k = len(weights)
        self.centre.copy_(torch.from_numpy(basis.center))
        self.left.zero_()
        self.left[:, :k] = torch.from_numpy((basis.components[:k] / basis.scale).T)
        self.weights.zero_()
        self.weights[:k] = torch.from_numpy(weights)
        self.intercept.copy_(torch.from_numpy(intercept))
        self.fitted.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        """Return log-normalised expression, ``(b, G)``."""
        return ((features - self.centre) @ self.left) @ self.weights + self.intercept


def _residual(
    x: NDArray[np.float32],
    y: NDArray[np.float64],
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    bases: Sequence[Basis],
    choice: Choice,
) -> NDArray[np.float64]:
    """Return the deviation of each gene from its prediction in sections that were left out."""
    squares = np.zeros(y.shape[1])
    for (train, test), basis in zip(folds, bases, strict=True):
        weights, intercept = solve(basis, y[train], choice)
        predicted = basis.project(x[test])[:, : len(weights)] @ weights + intercept
        squares += np.square(y[test] - predicted).sum(axis=0)
    return np.sqrt(squares / len(y))
