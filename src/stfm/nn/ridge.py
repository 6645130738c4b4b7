"""Ridge on principal components, and the choice of its numbers on held-out sections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm.metrics.expression import gene_pearson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["ALPHAS", "RULES", "Basis", "Choice", "Fold", "choose", "held_out", "solve"]

#: ridge penalties as multiples of the mean variance (sum of squares) of the components
ALPHAS = tuple(float(a) for a in 10.0 ** np.arange(-2.0, 3.01, 0.25))

#: how a setting is picked from the scores on held-out sections
RULES = ("best", "one_se")

_BLOCKS = 5
#: a larger matrix is not decomposed whole: its leading part is found by subspace iteration
_LARGE = 3000
_ITERATIONS = 20
_OVERSAMPLING = 64
_FLAT = 1e-6

Fold = tuple["NDArray[np.int64]", "NDArray[np.int64]"]


@dataclass(frozen=True)
class Choice:
    """One setting of the ridge, and its mean r on held-out sections."""

    n_components: int
    alpha: float
    rank: int | None
    score: float = float("nan")

    @classmethod
    def grid(cls, sizes: Sequence[int], alphas: Sequence[float], ranks: Sequence[int | None]) -> list[Choice]:
        """Return every combination, the plainest first, so that a tie goes to it."""
        ordered = sorted(ranks, key=lambda rank: (rank is not None, -(rank or 0)))
        return [cls(k, a, r) for k, r, a in product(sizes, ordered, sorted(alphas, reverse=True))]

    def described(self) -> dict[str, Any]:
        """Return it as plain values."""
        rank = "full" if self.rank is None else self.rank
        return {"n_components": self.n_components, "alpha": self.alpha, "rank": rank, "held_out_r": self.score}


@dataclass(frozen=True)
class Basis:
    """Standardisation and principal components of training features, and the training scores on them.

    Attributes
    ----------
    center, scale
        Of the features, ``(f,)``.
    components
        ``(k, f)``, orthonormal rows.
    scores
        Training features on them, ``(n, k)``; columns are orthogonal and centred.
    power
        Sum of squares of each column of ``scores``.
    """

    center: NDArray[np.float32]
    scale: NDArray[np.float32]
    components: NDArray[np.float32]
    scores: NDArray[np.float64]
    power: NDArray[np.float64]

    @classmethod
    def of(cls, x: NDArray[np.float32], n_components: int, *, standardise: bool = True) -> Basis:
        """Compute it by the smaller of the two Gram matrices.

        Features that are principal components already are not to be standardised again, which would give the last of
        them the weight of the first.
        """
        center = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        scale = x.std(axis=0, dtype=np.float64)
        varies = scale > _FLAT * np.maximum(np.abs(center), 1.0)
        scale = np.where(varies & standardise, scale, 1.0).astype(np.float32)
        z = (x - center) / scale
        if z.shape[0] <= z.shape[1]:
            power, left = _leading((z @ z.T).astype(np.float64), n_components)
            components = (left / np.sqrt(power)).T.astype(np.float32) @ z
        else:
            power, right = _leading((z.T @ z).astype(np.float64), n_components)
            components = np.ascontiguousarray(right.T).astype(np.float32)
            left = (z @ components.T) / np.sqrt(power)
        return cls(center, scale, components, left * np.sqrt(power), power)

    def project(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the scores of other features."""
        scores: NDArray[np.float64] = (((x - self.center) / self.scale) @ self.components.T).astype(np.float64)
        return scores


def _leading(gram: NDArray[np.float64], n_components: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the leading eigenvalues and eigenvectors of a Gram matrix, those without variance left out."""
    values, vectors = np.linalg.eigh(gram) if len(gram) <= _LARGE else _subspace(gram, n_components)
    kept = min(n_components, max(int((values > 1e-6 * values[-1]).sum()), 1))
    order = np.arange(len(values))[::-1][:kept]
    return np.maximum(values[order], 1e-12), vectors[:, order]


def _subspace(gram: NDArray[np.float64], n_components: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return leading eigenvalues (rising) and eigenvectors; seeded, each step in 32 bits, the last in 64."""
    single = gram.astype(np.float32)
    basis = np.random.default_rng(0).normal(size=(len(gram), n_components + _OVERSAMPLING)).astype(np.float32)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(single @ basis)[0]
    exact = np.linalg.qr(basis.astype(np.float64))[0]
    values, turn = np.linalg.eigh(exact.T @ (gram @ exact))
    return values, exact @ turn


def held_out(sizes: Sequence[int], coords: Sequence[NDArray[np.float64]] | None = None) -> list[Fold]:
    """Return (train, held out) rows: each section in turn, or contiguous blocks of the only one."""
    if len(sizes) > 1:
        section = np.repeat(np.arange(len(sizes)), sizes)
    else:
        place = np.arange(sizes[0], dtype=np.float64)
        if coords is not None:
            points = np.asarray(coords[0])[:, :2]
            place = points[:, int(np.argmax(np.ptp(points, axis=0)))]
        section = np.empty(sizes[0], np.int64)
        section[np.argsort(place, kind="stable")] = np.arange(sizes[0]) * _BLOCKS // sizes[0]
    return [(np.flatnonzero(section != s), np.flatnonzero(section == s)) for s in np.unique(section)]


def choose(
    x: NDArray[np.float32],
    y: NDArray[np.float64],
    folds: Sequence[Fold],
    bases: Sequence[Basis],
    grid: Sequence[Choice],
    rule: str = "best",
) -> Choice:
    """Return the setting with the best mean r over held-out sections (constant = 0), or the stiffest that is as good.

    Parameters
    ----------
    x, y
        Features and targets of all training spots.
    folds, bases
        Rows that fit and rows that are held out, and the basis of the former.
    grid
        What to choose from.
    rule
        ``"best"``; or ``"one_se"``: of the settings of the same rank and size whose mean r lies within one standard
        error (over held-out sections) of the best, the one with the largest penalty.
    """
    scores = np.zeros((len(folds), len(grid)))
    most = max((c.rank for c in grid if c.rank is not None), default=0)
    for fold, ((train, test), basis) in enumerate(zip(folds, bases, strict=True)):
        z = basis.project(x[test])
        for (k, alpha), members in _by_penalty(grid).items():
            weights, intercept = solve(basis, y[train], Choice(k, alpha, None))
            full = z[:, : len(weights)] @ weights
            right = None
            for i in members:
                rank = grid[i].rank
                predicted = full
                if rank is not None and rank < min(weights.shape):
                    right = _directions(basis, weights, most) if right is None else right
                    predicted = (full @ right[:rank].T) @ right[:rank]
                scores[fold, i] = gene_pearson(y[test], predicted + intercept).mean()
    mean = scores.mean(axis=0)
    best = int(np.argmax(mean))
    if rule == "one_se":
        error = float(scores[:, best].std(ddof=1)) / np.sqrt(len(folds))
        alike = [
            i
            for i, c in enumerate(grid)
            if (c.n_components, c.rank) == (grid[best].n_components, grid[best].rank) and mean[i] >= mean[best] - error
        ]
        best = max(alike, key=lambda i: grid[i].alpha)
    return replace(grid[best], score=float(mean[best]))


def solve(basis: Basis, y: NDArray[np.float64], choice: Choice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coefficients ``(k, g)`` and the intercept ``(g,)`` of one setting.

    The scores are orthogonal, so that ridge shrinks each by itself; the rank is reduced by projecting the fitted values
    on their leading right singular vectors (reduced-rank regression).
    """
    intercept = y.mean(axis=0)
    k = min(choice.n_components, len(basis.power))
    power = basis.power[:k]
    penalty = choice.alpha * power.mean()
    weights = (basis.scores[:, :k].T @ (y - intercept)) / (power + penalty)[:, None]
    if choice.rank is not None and choice.rank < min(weights.shape):
        right = _directions(basis, weights, choice.rank)
        weights = (weights @ right.T) @ right
    return weights, intercept


def _directions(basis: Basis, weights: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return the n strongest directions of the fitted values among the genes, ``(n, g)``."""
    fitted = np.sqrt(basis.power[: len(weights)])[:, None] * weights
    # By the Gram matrix of the components, which is small; only the strongest are wanted, so squaring does no harm.
    values, left = np.linalg.eigh(fitted @ fitted.T)
    strongest = np.argsort(values)[::-1][:n]
    right: NDArray[np.float64] = left[:, strongest].T @ fitted
    right /= np.maximum(np.linalg.norm(right, axis=1, keepdims=True), 1e-12)
    return right


def _by_penalty(grid: Sequence[Choice]) -> dict[tuple[int, float], list[int]]:
    groups: dict[tuple[int, float], list[int]] = {}
    for i, choice in enumerate(grid):
        groups.setdefault((choice.n_components, choice.alpha), []).append(i)
    return groups
