"""Spatial domains by BANKSY and SpaGCN, in an environment of their own (requirements.txt).

    python benchmarks/_storm_domains.py DATA FOLDER    (in the environment of stfm: writes the slides)
    python benchmarks/peers/domains.py FOLDER --results benchmarks/results/storm_domains_peers.json

Each method runs as its authors advise: BANKSY 1.3.5 with lambda .2, 15 neighbours, one azimuthal filter, 20 components
of 2000 variable genes, Gaussian mixture with full covariances (in place of mclust); SpaGCN 1.2.7 without histology,
p = .5, its own search for l and for the resolution, and its refinement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture

VARIABLE = 2000
#: share of the spots in which a gene must be detected, as for STORM: rare genes decide otherwise on small slides
DETECTED = 0.1


def banksy(adata: Any, n_domains: int, seeds: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the domains of each seed; the embedding is the same for all."""
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy

    adata = adata.copy()
    sc.pp.filter_genes(adata, min_cells=int(DETECTED * adata.n_obs))
    sc.pp.normalize_total(adata, target_sum=float(np.median(np.asarray(adata.X.sum(axis=1)))))
    logged = sc.pp.log1p(adata, copy=True)
    sc.pp.highly_variable_genes(logged, n_top_genes=min(VARIABLE, adata.n_vars))
    adata = logged[:, logged.var["highly_variable"].to_numpy()].copy()
    adata.obs["x"], adata.obs["y"] = adata.obsm["spatial"].T
    graph = initialize_banksy(
        adata, ("x", "y", "spatial"), 15, nbr_weight_decay="scaled_gaussian", max_m=1,
        plt_edge_hist=False, plt_nbr_weights=False, plt_theta=False,
    )  # fmt: skip
    made, _ = generate_banksy_matrix(adata, graph, [0.2], 1, verbose=False)
    matrix = made["scaled_gaussian"][0.2]["adata"].X
    scores = PCA(20, random_state=0).fit_transform(np.nan_to_num(np.asarray(matrix)))
    for seed in seeds:
        yield seed, GaussianMixture(n_domains, n_init=3, random_state=seed).fit_predict(scores)


def spagcn(adata: Any, n_domains: int, seeds: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the domains of each seed, refined."""
    import SpaGCN
    import torch

    adata = adata.copy()
    sc.pp.filter_genes(adata, min_cells=int(DETECTED * adata.n_obs))
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata.X = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
    x, y = adata.obsm["spatial"].T
    between = SpaGCN.calculate_adj_matrix(x=x, y=y, histology=False)
    length = SpaGCN.search_l(0.5, between, start=0.01, end=10_000, tol=0.01, max_run=100)
    hexagonal = np.median(np.sort(between, axis=1)[:, 6] / np.maximum(np.sort(between, axis=1)[:, 1], 1e-9)) < 1.2
    resolution = SpaGCN.search_res(adata, between, length, n_domains, start=0.7, step=0.1, tol=5e-3, lr=0.05)
    for seed in seeds:
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what the package draws from
        model = SpaGCN.SpaGCN()
        model.set_l(length)
        model.train(adata, between, init_spa=True, init="louvain", res=resolution, tol=5e-3, lr=0.05, max_epochs=200)
        found = np.asarray(model.predict()[0])
        shape = "hexagon" if hexagonal else "square"
        yield seed, np.asarray(SpaGCN.refine(adata.obs_names.tolist(), found.tolist(), between, shape=shape))


METHODS = {"BANKSY 1.3.5 (lambda .2, GMM full)": banksy, "SpaGCN 1.2.7 (own clustering, refined)": spagcn}


def score(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Return ARI, NMI and AMI of the labelled spots."""
    kept = truth != "nan"
    pair = truth[kept], found[kept]
    return {
        "ARI": adjusted_rand_score(*pair),
        "NMI": normalized_mutual_info_score(*pair),
        "AMI": adjusted_mutual_info_score(*pair),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="slides as h5ad: counts, obs['label'], obsm['spatial']")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", help="only methods whose names begin so")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for title, method in METHODS.items():
        if options.methods and not title.startswith(tuple(options.methods)):
            continue
        for path in sorted(options.folder.glob("*.h5ad"), key=lambda p: p.stat().st_size):
            adata = ad.read_h5ad(path)
            truth = adata.obs["label"].astype(str).to_numpy()
            n_domains = len(set(truth) - {"nan"})
            start = time.perf_counter()
            with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
                for seed, found in method(adata, n_domains, list(range(options.seeds))):
                    lines.append({"slide": path.stem, "row": title, "seed": seed, **score(truth, found)})
            taken = time.perf_counter() - start
            print(
                path.stem, title, round(np.mean([one["ARI"] for one in lines[-options.seeds :]]), 3), round(taken), "s"
            )
            packages = {name: metadata.version(name) for name in ("pybanksy", "SpaGCN", "scanpy", "torch")}
            options.results.write_text(json.dumps({"versions": packages, "scores": lines}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
