"""Scores of the default model, and what is won on another row by a bootstrap of blocks of tissue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import stfm as sf

GALLERY, GALLERIES = 128, 20
TOP = (1, 5, 10)
DIRECTIONS = ("H&E to counts", "counts to H&E")
#: draws of labelled spots, and how many spots of a class are labelled
DRAWS, LABELLED = 20, (5, 20)
_BOOTSTRAP = 200


def gain(statistic: Callable[[np.ndarray], float], coords: np.ndarray) -> dict[str, float]:
    """Return a difference on all spots, and the central 90 % of it over draws of blocks (6 x 6 over the slide).

    Neighbouring spots are alike, so whole blocks are drawn with replacement.
    """
    unit = (coords[:, :2] - coords[:, :2].min(axis=0)) / np.maximum(np.ptp(coords[:, :2], axis=0), 1e-9)
    block = np.minimum((unit * 6).astype(int), 5) @ np.array([6, 1])
    members = [np.flatnonzero(block == b) for b in np.unique(block)]
    rng = np.random.default_rng(0)
    draws = [
        statistic(np.concatenate([members[b] for b in rng.integers(len(members), size=len(members))]))
        for _ in range(_BOOTSTRAP)
    ]
    low, high = np.nanquantile(draws, [0.05, 0.95])
    return {"gain": statistic(np.arange(len(coords))), "low": float(low), "high": float(high)}


def ari(truth: np.ndarray, found: np.ndarray) -> float:
    """Return the adjusted Rand index of integer labels; those below 0 in ``truth`` are left out."""
    kept = truth >= 0
    table = np.zeros((truth.max() + 1, found.max() + 1))
    np.add.at(table, (truth[kept], found[kept]), 1)
    together = (table * (table - 1)).sum() / 2
    rows, columns = ((side * (side - 1)).sum() / 2 for side in (table.sum(axis=1), table.sum(axis=0)))
    n = table.sum()
    by_chance = rows * columns / max(n * (n - 1) / 2, 1)
    most = (rows + columns) / 2
    return float((together - by_chance) / (most - by_chance)) if most > by_chance else 0.0


def ari_gain(
    truth: np.ndarray, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], coords: np.ndarray
) -> dict[str, float]:
    """Return what is won in ARI, the mean over the labellings of all seeds on either side."""

    def difference(spots: np.ndarray) -> float:
        mean = [np.mean([ari(truth[spots], found[spots]) for found in side]) for side in (ours, theirs)]
        return float(mean[0] - mean[1])

    return gain(difference, coords)


def expression_gain(measured: np.ndarray, ours: np.ndarray, theirs: np.ndarray, coords: np.ndarray) -> dict[str, float]:
    """Return what is won in mean r over genes."""

    def difference(spots: np.ndarray) -> float:
        r = [sf.metrics.gene_pearson(measured[spots], guess[spots]).mean() for guess in (ours, theirs)]
        return float(r[0] - r[1])

    return gain(difference, coords)


def mean_gain(ours: np.ndarray, theirs: np.ndarray, coords: np.ndarray) -> dict[str, float]:
    """Return what is won in a score that every spot has for itself; nan where it was never asked."""
    return gain(lambda spots: float(np.nanmean(ours[spots]) - np.nanmean(theirs[spots])), coords)


def retrieve(image: np.ndarray, gene: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """Return by direction and k how often each spot finds its own other half, nan where it was never drawn.

    Both sides are centred over the slide; nearest is by cosine; a tie counts against the right one.
    """
    sides = [_directions(image), _directions(gene)]
    n = len(image)
    size = min(GALLERY, n)
    found = {way: {k: np.zeros(n) for k in TOP} for way in DIRECTIONS}
    asked = np.zeros(n)
    rng = np.random.default_rng(0)
    for _ in range(GALLERIES):
        spots = rng.choice(n, size, replace=False)
        near = sides[0][spots] @ sides[1][spots].T
        asked[spots] += 1
        for way, table in zip(DIRECTIONS, (near, near.T), strict=True):
            rank = (table >= np.diag(table)[:, None]).sum(axis=1)
            for k in TOP:
                found[way][k][spots] += rank <= k
    with np.errstate(invalid="ignore"):
        return {way: {k: hits / asked for k, hits in by.items()} for way, by in found.items()}


def _directions(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def recall_lines(hits: Mapping[str, Mapping[int, np.ndarray]], **where: Any) -> list[dict[str, Any]]:
    """Return a line a direction and k."""
    return [
        {**where, "direction": way, "k": k, "recall": float(np.nanmean(value))}
        for way, by in hits.items()
        for k, value in by.items()
    ]


def annotate(values: np.ndarray, truth: np.ndarray, n_labelled: int) -> tuple[list[float], list[float], np.ndarray]:
    """Return accuracy and macro-F1 of each draw, and how often each spot was right (nan where it never was asked).

    Of every class so many spots have a label, at most half of it; logistic regression tells those of the others. The
    draws are the same for every row.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import StandardScaler

    known = np.flatnonzero(truth >= 0)
    classes = [known[truth[known] == c] for c in np.unique(truth[known])]
    x = StandardScaler().fit_transform(np.asarray(values, dtype=np.float64))
    right, asked = np.zeros(len(truth)), np.zeros(len(truth))
    accuracy, f1 = [], []
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        train = np.concatenate([rng.choice(c, min(n_labelled, len(c) // 2), replace=False) for c in classes])
        test = np.setdiff1d(known, train)
        found = LogisticRegression(C=1.0, max_iter=1000).fit(x[train], truth[train]).predict(x[test])
        right[test] += found == truth[test]
        asked[test] += 1
        accuracy.append(float((found == truth[test]).mean()))
        f1.append(float(f1_score(truth[test], found, average="macro")))
    with np.errstate(invalid="ignore"):
        return accuracy, f1, right / asked
