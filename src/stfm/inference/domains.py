"""Spatial domains from an embedding: clustering, refinement over neighbours. Arrays in, arrays out."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from stfm._errors import InputError, StfmWarning
from stfm._logging import get_logger
from stfm._validate import check_choice, check_count, resolve_rng

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["COVARIANCES", "METHODS", "cluster", "majority", "reduce"]

Method = Literal["gmm", "consensus", "kmeans", "leiden"]
METHODS = ("gmm", "consensus", "kmeans", "leiden")
COVARIANCES = ("tied", "full", "diag", "spherical")

_STEPS = 25  # of the bisection; the resolution is then known to 1e-6
_RESOLUTIONS = (0.005, 20.0)

#: numbers of leading components on which the mixtures of a consensus are fitted
_CONSENSUS = (6, 8, 10, 12, 15, 20)

logger = get_logger("domains")


def reduce(embedding: ArrayLike, n_components: int | None = 30, *, whiten: bool = False) -> NDArray[np.float64]:
    """Return the leading principal components of an embedding.

    Parameters
    ----------
    embedding
        One row a spot, ``(n, d)``.
    n_components
        Components to keep at most; None keeps all that have variance.
    whiten
        Whether each component gets variance 1, so that k-means sees the shape that a mixture with one covariance sees.

    Returns
    -------
    float64 ``(n, m)``, signs fixed so that the same data give the same result.
    """
    values = np.asarray(embedding, dtype=np.float64)
    centred = values - values.mean(axis=0)
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    rank = int((scale > 1e-6 * max(float(scale[0]), 1e-300)).sum()) if scale.size else 0
    kept = rank if n_components is None else min(n_components, rank)
    if kept == 0:
        msg = "the embedding is the same for every spot; there is nothing to cluster."
        raise InputError(msg)
    largest = np.argmax(np.abs(right[:kept]), axis=1)
    signs = np.sign(right[np.arange(kept), largest])
    spread = np.full(kept, np.sqrt(len(values) - 1)) if whiten else scale[:kept]
    scores: NDArray[np.float64] = left[:, :kept] * (signs * spread)
    return scores


def cluster(
    embedding: ArrayLike,
    n_domains: int,
    *,
    method: Method = "gmm",
    covariance: str = "tied",
    n_components: int | None = 30,
    whiten: bool = False,
    n_init: int = 10,
    n_neighbors: int = 15,
    rng: int | np.random.Generator | None = 0,
) -> NDArray[np.int64]:
    """Cluster the rows of an embedding.

    Parameters
    ----------
    embedding
        One row a spot, ``(n, d)``, finite.
    n_domains
        Number of domains.
    method
        ``"gmm"`` (Gaussian mixture); ``"consensus"`` (mixtures on 6 to 20 leading components from ``n_init`` starts
        each; the more likely half of each number has a vote, and spots on which the votes agree lie together: it moves
        little with the seed); ``"kmeans"``; or ``"leiden"`` on the graph of nearest neighbours in the embedding, its
        resolution found by bisection.
    covariance
        Of the mixture: ``"tied"`` (one for all; the form that works best on few, unequal domains), ``"full"``,
        ``"diag"``, ``"spherical"``.
    n_components
        Principal components that are kept first; None for all.
    whiten
        Whether the components get variance 1 first.
    n_init
        Random starts of ``"gmm"`` and ``"kmeans"``, of which the best likelihood or inertia wins, and of
        ``"consensus"``.
    n_neighbors
        Of the graph of ``"leiden"``.
    rng
        Seed or generator.

    Returns
    -------
    Labels 0, 1, … in falling order of size, int64 ``(n,)``.
    """
    check_choice("method", method, METHODS)
    check_choice("covariance", covariance, COVARIANCES)
    check_count("n_domains", n_domains)
    check_count("n_init", n_init)
    values = np.asarray(embedding)
    if values.ndim != 2 or not np.isfinite(values).all():
        msg = f"the embedding must be finite with one row a spot, got shape {values.shape}."
        raise InputError(msg)
    if n_domains > len(values):
        msg = f"n_domains={n_domains} is more than the {len(values)} spots."
        raise InputError(msg)
    if n_domains == 1:
        return np.zeros(len(values), np.int64)
    scores = reduce(values, n_components, whiten=whiten)
    seed = int(resolve_rng(rng).integers(2**31 - 1))
    if method == "leiden":
        labels = _leiden(scores, n_domains, n_neighbors=n_neighbors, seed=seed)
    elif method == "kmeans":
        labels = _kmeans(scores, n_domains, n_init, seed)
    elif method == "consensus":
        labels = _consensus(scores, n_domains, covariance, n_init, seed)
    else:
        labels = _fit_mixture(scores, n_domains, covariance, n_init, seed)[0]
    return _by_size(labels)


def majority(labels: ArrayLike, graph: sparse.csr_matrix, *, n_times: int = 1) -> NDArray[np.int64]:
    """Give each spot the domain that most of its neighbours and itself are in; a tie leaves it as it is.

    Parameters
    ----------
    labels
        Integer labels ``(n,)``.
    graph
        Neighbours, CSR ``(n, n)``; weights are not used.
    n_times
        How often.

    Returns
    -------
    Labels, int64 ``(n,)``.
    """
    check_count("n_times", n_times)
    current = np.asarray(labels, dtype=np.int64)
    n, n_labels = len(current), int(current.max(initial=0)) + 1
    linked = sparse.csr_matrix(graph, dtype=np.float32, copy=True)
    linked.data[:] = 1.0
    linked.setdiag(1.0)
    rows = np.arange(n)
    for _ in range(n_times):
        member = sparse.csr_matrix((np.ones(n, np.float32), (rows, current)), shape=(n, n_labels))
        votes = np.asarray((linked @ member).todense())
        best = votes.argmax(axis=1)
        changed = votes[rows, best] > votes[rows, current]
        current = np.where(changed, best, current).astype(np.int64)
    return current


def _kmeans(scores: NDArray[np.float64], n_domains: int, n_init: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans

    found = KMeans(n_domains, n_init=n_init, random_state=seed).fit_predict(scores)
    return np.asarray(found, dtype=np.int64)


def _fit_mixture(
    scores: NDArray[np.float64], n_domains: int, covariance: str, n_init: int, seed: int
) -> tuple[NDArray[np.int64], float]:
    """Return the most likely domain of each spot, and the mean log-likelihood."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        n_domains,
        covariance_type=covariance,
        n_init=n_init,
        random_state=seed,
        max_iter=300,
        reg_covar=1e-6 * float(scores.var()),
    )
    with warnings.catch_warnings():
        # A start that has not converged after 300 steps is still a valid partition, and others compete with it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = np.asarray(mixture.fit_predict(scores), dtype=np.int64)
    return labels, float(mixture.lower_bound_)


def _consensus(
    scores: NDArray[np.float64], n_domains: int, covariance: str, n_init: int, seed: int
) -> NDArray[np.int64]:
    """Cluster the votes of many mixtures.

    One mixture is decided by its start and by how many components it sees. What most of the likelier ones agree on is
    the same from seed to seed.
    """
    draw = np.random.default_rng(seed)
    votes = []
    for width in sorted({min(width, scores.shape[1]) for width in _CONSENSUS}):
        leading = scores[:, :width]
        starts = [int(start) for start in draw.integers(2**31 - 1, size=n_init)]
        fits = sorted((_fit_mixture(leading, n_domains, covariance, 1, start) for start in starts), key=lambda f: -f[1])
        votes += [np.eye(n_domains)[labels] for labels, _ in fits[: max(1, n_init // 2)]]
    table = np.concatenate(votes, axis=1)
    return _kmeans(table, n_domains, 10, seed)


def _leiden(scores: NDArray[np.float64], n_domains: int, *, n_neighbors: int, seed: int) -> NDArray[np.int64]:
    """Leiden at the resolution that gives ``n_domains``; the nearest number where none does, and a warning."""
    from stfm._optional import require

    igraph = require("igraph", extra="leiden")
    links = sparse.triu(_shared_neighbours(scores, n_neighbors)).tocoo()
    edges = np.column_stack([links.row, links.col])
    graph = igraph.Graph(n=len(scores), edges=edges, edge_attrs={"weight": links.data})
    low, high = _RESOLUTIONS
    best = -len(scores), np.zeros(len(scores), np.int64)
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        labels = _partition(igraph, graph, middle, seed)
        found = int(labels.max()) + 1
        if abs(found - n_domains) < abs(best[0] - n_domains):
            best = found, labels
        if found == n_domains:
            logger.info("leiden: %d domains at resolution %.4g", found, middle)
            break
        low, high = (middle, high) if found < n_domains else (low, middle)
    if best[0] != n_domains:
        msg = f"leiden found {best[0]} domains at best, not {n_domains}; method='gmm' gives the number asked for."
        warnings.warn(msg, StfmWarning, stacklevel=4)
    return best[1]


def _partition(igraph: Any, graph: Any, resolution: float, seed: int) -> NDArray[np.int64]:
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden(
            objective_function="modularity", weights="weight", resolution=resolution, n_iterations=5
        )
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(found.membership, dtype=np.int64)


def _shared_neighbours(scores: NDArray[np.float64], n_neighbors: int) -> sparse.csr_matrix:
    """Return the graph of nearest neighbours, weighted by the share of neighbours that two spots have in common."""
    from sklearn.neighbors import NearestNeighbors

    k = min(n_neighbors, len(scores) - 1)
    # each spot is the first neighbour of its own, which makes the share of two linked spots positive
    linked = NearestNeighbors(n_neighbors=k + 1).fit(scores).kneighbors_graph(scores)
    union = linked.maximum(linked.T)
    common: sparse.csr_matrix = (linked @ linked.T).multiply(union).tocsr()
    common.setdiag(0.0)
    common.eliminate_zeros()
    common.data = common.data / (2 * (k + 1) - common.data)
    return common


def _by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the labels by falling size, ties by first appearance."""
    names, first, codes, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return rank[codes]
