"""Spatial domains by simple recipes: rows that every learned embedding stands beside.

adata = read_dlpfc(data, "151673")
table = run_domains({"151673": adata}, simple_rows(), n_domains=7, seeds=range(5))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

import stfm as sf
from stfm.inference.domains import cluster, majority
from stfm.inference.rings import ring_graphs, ring_means

Embed = Callable[[Any, int], np.ndarray]


@dataclass(frozen=True)
class DomainRow:
    """An embedding of an AnnData (given a seed), and how it is clustered."""

    embed: Embed
    options: Mapping[str, Any] = field(default_factory=dict)
    refine: bool = False


def log_counts(adata: Any) -> np.ndarray:
    """Return ``log1p(1e4 c / sum c)``, float32 ``(n, g)``."""
    counts = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    total = counts.sum(axis=1, keepdims=True)
    return np.log1p(1e4 * counts / np.where(total > 0, total, 1)).astype(np.float32)


def pca(values: np.ndarray, n_components: int, seed: int = 0) -> np.ndarray:
    """Return principal components of a table."""
    from sklearn.decomposition import PCA

    kept = min(n_components, *values.shape)
    return PCA(kept, svd_solver="randomized", random_state=seed).fit_transform(values).astype(np.float32)


def gene_pca(n_components: int = 30) -> Embed:
    """Principal components of log counts."""
    return lambda adata, seed: pca(log_counts(adata), n_components, seed)


def smoothed(embed: Embed, *, rings: int = 1, times: int = 1) -> Embed:
    """Average an embedding over the spot and its rings of neighbours."""

    def smooth(adata: Any, seed: int) -> np.ndarray:
        values = embed(adata, seed)
        graphs = ring_graphs(adata.obsm["spatial"], rings)
        for _ in range(times):
            values = ring_means(values, sum(graphs[1:], graphs[0]), with_self=True)
        return values

    return smooth


def from_obsm(key: str) -> Embed:
    """Take an embedding that is there already."""
    return lambda adata, _seed: np.asarray(adata.obsm[key])


def simple_rows() -> dict[str, DomainRow]:
    """Rows that need no training: principal components, and their means over neighbours."""
    return {
        "PCA 30, k-means": DomainRow(gene_pca(), {"method": "kmeans"}),
        "PCA 30, GMM tied": DomainRow(gene_pca()),
        "PCA 30 averaged over self + ring 1, GMM tied": DomainRow(smoothed(gene_pca())),
        "PCA 15, twice over two rings, GMM tied, majority": DomainRow(
            smoothed(gene_pca(15), rings=2, times=2), refine=True
        ),
    }


def run_domains(
    slides: Mapping[str, Any],
    rows: Mapping[str, DomainRow],
    *,
    n_domains: int = 7,
    label: str = "label",
    seeds: Iterable[int] = range(5),
    n_init: int = 5,
) -> pd.DataFrame:
    """Return a table with a line a row, slide and seed: ARI, NMI, AMI and the rest of ``sf.metrics.domain_scores``.

    Unlabelled spots take part in the clustering and are left out of the score.
    """
    lines = []
    for name, adata in slides.items():
        for title, row in rows.items():
            for seed in seeds:
                labels = cluster(row.embed(adata, seed), n_domains, rng=seed, n_init=n_init, **row.options)
                if row.refine:
                    labels = majority(labels, ring_graphs(adata.obsm["spatial"], 1)[0])
                scores = sf.metrics.domain_scores(adata.obs[label], labels, coords=adata.obsm["spatial"])
                lines.append({"slide": name, "row": title, "seed": seed, **scores})
    return pd.DataFrame(lines)


def summary(table: pd.DataFrame, score: str = "ARI") -> pd.DataFrame:
    """Return mean and spread over seeds a slide, and the median of the means over slides."""
    order = list(dict.fromkeys(table["row"]))
    means = table.pivot_table(index="row", columns="slide", values=score, aggfunc="mean").loc[order]
    spread = table.pivot_table(index="row", columns="slide", values=score, aggfunc="std").loc[order].fillna(0.0)
    shown = means.round(3).astype(str) + " ± " + spread.round(3).astype(str)
    shown["median"] = means.median(axis=1).round(3)
    return shown
