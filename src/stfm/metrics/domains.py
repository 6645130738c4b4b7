"""Agreement of found domains with known ones, and their spatial coherence: thin over scikit-learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

#: labels that stand for "not annotated" beside missing values
UNLABELLED = ("", "nan", "none", "NA", "undetermined", "unlabelled", "unlabeled")


def _codes(labels: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return integer codes and which entries hold a label at all."""
    import pandas as pd

    values = np.asarray(labels, dtype=object)
    codes, _ = pd.factorize(values.astype(str))
    return codes.astype(np.int64), pd.notna(values)


def _pair(truth: ArrayLike, found: ArrayLike, ignore: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the codes of both labellings where the truth holds a label that counts."""
    import pandas as pd

    if np.shape(truth) != np.shape(found) or np.ndim(truth) != 1:
        msg = f"truth and found must be labels of the same spots, got shapes {np.shape(truth)} and {np.shape(found)}."
        raise InputError(msg)
    true, labelled = _codes(truth)
    guess, present = _codes(found)
    named = pd.Series(np.asarray(truth, dtype=object)).astype(str).str.lower().to_numpy()
    keep = labelled & ~np.isin(named, [word.lower() for word in ignore])
    if not present[keep].all():
        msg = f"{int((~present[keep]).sum())} labelled spots have no found domain; every spot needs one."
        raise InputError(msg)
    if not keep.any():
        msg = "no spot has a true label that counts; check the column and `ignore`."
        raise InputError(msg)
    return true[keep], guess[keep]


def ari(truth: ArrayLike, found: ArrayLike, *, ignore: Sequence[str] = UNLABELLED) -> float:
    """Adjusted Rand index: 1 for equal partitions, 0 in the mean for random ones, can be negative.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    ignore
        True labels that stand for "not annotated": those spots, and missing values, are left out of the score.

    Returns
    -------
    The score, at most 1.

    Examples
    --------
    >>> from stfm import metrics
    >>> metrics.ari(["a", "a", "b", "b"], [1, 1, 0, 0])
    1.0
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(*_pair(truth, found, ignore)))


def nmi(truth: ArrayLike, found: ArrayLike, *, ignore: Sequence[str] = UNLABELLED) -> float:
    """Normalised mutual information (arithmetic mean); not corrected for chance.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    ignore
        True labels that stand for "not annotated": those spots, and missing values, are left out of the score.

    Returns
    -------
    The score between 0 and 1.

    Examples
    --------
    >>> from stfm import metrics
    >>> round(metrics.nmi(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    0.8
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(*_pair(truth, found, ignore)))


def ami(truth: ArrayLike, found: ArrayLike, *, ignore: Sequence[str] = UNLABELLED) -> float:
    """Mutual information adjusted for chance: the one to report for few domains.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    ignore
        True labels that stand for "not annotated": those spots, and missing values, are left out of the score.

    Returns
    -------
    The score: 1 for equal partitions, 0 in the mean for random ones.

    Examples
    --------
    >>> from stfm import metrics
    >>> round(metrics.ami(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    0.571
    """
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(*_pair(truth, found, ignore)))


def fmi(truth: ArrayLike, found: ArrayLike, *, ignore: Sequence[str] = UNLABELLED) -> float:
    """Fowlkes-Mallows index: geometric mean of pairwise precision and recall.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    ignore
        True labels that stand for "not annotated": those spots, and missing values, are left out of the score.

    Returns
    -------
    The score between 0 and 1.

    Examples
    --------
    >>> from stfm import metrics
    >>> round(metrics.fmi(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    0.707
    """
    from sklearn.metrics import fowlkes_mallows_score

    return float(fowlkes_mallows_score(*_pair(truth, found, ignore)))


def homogeneity(truth: ArrayLike, found: ArrayLike, *, ignore: Sequence[str] = UNLABELLED) -> float:
    """Homogeneity: 1 where every found domain holds one true label.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    ignore
        True labels that stand for "not annotated": those spots, and missing values, are left out of the score.

    Returns
    -------
    The score between 0 and 1.

    Examples
    --------
    >>> from stfm import metrics
    >>> round(metrics.homogeneity(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    1.0
    """
    from sklearn.metrics import homogeneity_score

    return float(homogeneity_score(*_pair(truth, found, ignore)))


def completeness(truth: ArrayLike, found: ArrayLike, *, ignore: Sequence[str] = UNLABELLED) -> float:
    """Completeness: 1 where every true label lies in one found domain.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    ignore
        True labels that stand for "not annotated": those spots, and missing values, are left out of the score.

    Returns
    -------
    The score between 0 and 1.

    Examples
    --------
    >>> from stfm import metrics
    >>> round(metrics.completeness(["a", "a", "b", "b"], [0, 0, 1, 2]), 3)
    0.667
    """
    from sklearn.metrics import completeness_score

    return float(completeness_score(*_pair(truth, found, ignore)))


def _located(labels: ArrayLike, coords: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    codes, known = _codes(labels)
    points = np.asarray(coords, dtype=np.float64)
    if points.ndim != 2 or len(points) != len(codes):
        msg = f"coords must have one row for each of the {len(codes)} labels, got shape {points.shape}."
        raise InputError(msg)
    if not np.isfinite(points).all():
        msg = "coords hold nan or infinite values."
        raise InputError(msg)
    return codes[known], points[known]


def chaos(labels: ArrayLike, coords: ArrayLike) -> float:
    """Mean distance to the nearest spot of the same domain, coordinates z-scaled; lower is more coherent.

    Parameters
    ----------
    labels
        Domain of each spot. Spots that are alone in their domain have no such distance and are left out.
    coords
        Coordinates ``(n, 2)`` or ``(n, 3)``, in any unit.

    Returns
    -------
    The mean distance, in standard deviations of the coordinates.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, image=False)
    >>> round(sf.metrics.chaos(adata.obs["domain"], adata.obsm["spatial"]), 2)
    0.64
    """
    from scipy.spatial import cKDTree

    codes, points = _located(labels, coords)
    spread = np.asarray(points.std(axis=0))
    points = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    groups = [points[codes == code] for code in np.unique(codes) if (codes == code).sum() > 1]
    distances = [np.asarray(cKDTree(group).query(group, k=2)[0])[:, 1] for group in groups]
    if not distances:
        msg = "every spot is alone in its domain; CHAOS is not defined."
        raise InputError(msg)
    return float(np.concatenate(distances).mean())


def pas(labels: ArrayLike, coords: ArrayLike, *, n_neighbors: int = 10, threshold: int = 6) -> float:
    """Share of spots with at least ``threshold`` of their ``n_neighbors`` in another domain; lower is smoother.

    Parameters
    ----------
    labels
        Domain of each spot.
    coords
        Coordinates ``(n, 2)`` or ``(n, 3)``, in any unit.
    n_neighbors, threshold
        Neighbours looked at, and how many of them must disagree.

    Returns
    -------
    The share, between 0 and 1.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, image=False)
    >>> round(sf.metrics.pas(adata.obs["domain"], adata.obsm["spatial"]), 2)
    0.95
    """
    from stfm.slide.niches import knn

    check_count("n_neighbors", n_neighbors)
    check_count("threshold", threshold)
    codes, points = _located(labels, coords)
    if len(codes) <= n_neighbors:
        msg = f"{len(codes)} spots are too few for n_neighbors={n_neighbors}."
        raise InputError(msg)
    neighbours = knn(points, n_neighbors).index
    return float(((codes[neighbours] != codes[:, None]).sum(axis=1) >= threshold).mean())


def domain_scores(
    truth: ArrayLike, found: ArrayLike, *, coords: ArrayLike | None = None, ignore: Sequence[str] = UNLABELLED
) -> dict[str, float]:
    """Return all scores of one labelling at once.

    Parameters
    ----------
    truth, found
        Labels of the same spots.
    coords
        Coordinates; with them CHAOS and PAS of the found domains (over all spots) are added.
    ignore
        True labels that stand for "not annotated".

    Returns
    -------
    dict with ``ARI NMI AMI FMI HOM COM`` and, with coordinates, ``CHAOS PAS``.

    Examples
    --------
    >>> from stfm import metrics
    >>> scores = metrics.domain_scores(["a", "a", "b", "b"], [0, 0, 1, 2])
    >>> round(scores["ARI"], 3)
    0.571
    """
    agreement = {"ARI": ari, "NMI": nmi, "AMI": ami, "FMI": fmi, "HOM": homogeneity, "COM": completeness}
    scores = {name: score(truth, found, ignore=ignore) for name, score in agreement.items()}
    if coords is not None:
        scores |= {"CHAOS": chaos(found, coords), "PAS": pas(found, coords)}
    return scores
