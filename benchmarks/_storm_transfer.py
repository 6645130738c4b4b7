"""One tissue measured by several platforms: how often the same place is found again by its embedding.

The cells of a toy tissue are measured four times: one by one, under Visium spots, under ST spots, in 50-µm bins. No
molecule is counted twice, and each platform catches every gene with an efficiency of its own. A model is trained on one
platform and embeds another. For every query of the target, the gallery holds the spot of the source at the same place
and others drawn at random; recall@k is the share of queries for which the right one is among the k nearest by cosine.
Chance is k over the size of the gallery. Real slides, read from ``data``, stand below (``_storm_transfer_real``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _domains as simple
import _storm_transfer_real as real
import numpy as np
import pandas as pd
from _common import table as markdown
from scipy import sparse
from scipy.spatial import cKDTree

import stfm as sf
from stfm.inference.rings import ring_graphs, ring_means
from stfm.slide import as_slides
from stfm.training.recipes import RECIPES

Save = Callable[[pd.DataFrame], None]
GALLERY = 128
QUERIES = 400
TOP = (1, 5, 10)
N_CELLS = 10_000
#: platform -> pitch and radius of a spot in µm; bins tile the tissue
SPOTS = {"Visium": (100.0, 27.5), "ST": (200.0, 50.0), "bins": (50.0, 25.0)}
#: mean share of the molecules of a cell that a platform catches, and the spread of its efficiency over genes
CAUGHT, SPREAD = 0.25, 0.3
#: source platform -> target platform
PAIRS = (("Visium", "cells"), ("Visium", "bins"), ("Visium", "ST"), ("bins", "Visium"), ("cells", "Visium"))
RECIPE = RECIPES["storm-small"].replace(max_steps=100)


def measure(rng: int) -> dict[str, Any]:
    """Return one tissue as each platform measures it; ``obsm["spatial"]`` in µm."""
    truth = sf.datasets.toy(n_spots=N_CELLS, layout="cells", image=False, depth=800.0, rng=rng)
    generator = np.random.default_rng(rng)
    left = truth.X.tocsr().astype(np.int64)
    xy = truth.obsm["spatial"]
    measured = {}
    for number, platform in enumerate(("cells", *SPOTS)):
        share = CAUGHT * np.exp(SPREAD * generator.normal(size=left.shape[1]) - SPREAD**2 / 2)
        share = np.clip(share / (1 - number * CAUGHT), 0.0, 1.0)  # of what the platforms before have left
        caught = left.copy()
        caught.data = generator.binomial(left.data, share[left.indices])
        left = left - caught
        places, members = (xy, sparse.identity(len(xy), format="csr")) if platform == "cells" else _under(xy, platform)
        measured[platform] = _adata(members @ caught, places, truth.var_names, platform)
    return measured


def _under(xy: np.ndarray, platform: str) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Return the spots of a platform with at least one cell, and which cells lie under them."""
    pitch, radius = SPOTS[platform]
    step = pitch * np.sqrt(3) / 2 if platform == "Visium" else pitch
    rows, columns = np.meshgrid(np.arange(0, xy[:, 1].max(), step), np.arange(0, xy[:, 0].max(), pitch), indexing="ij")
    if platform == "Visium":
        columns = columns + pitch / 2 * (np.arange(len(rows)) % 2)[:, None]
    spots = np.column_stack([columns.ravel(), rows.ravel()])
    norm = np.inf if platform == "bins" else 2
    cells = cKDTree(xy).query_ball_point(spots, radius, p=norm)
    kept = [i for i, found in enumerate(cells) if len(found)]
    index = np.concatenate([cells[i] for i in kept]).astype(int)
    spot = np.repeat(np.arange(len(kept)), [len(cells[i]) for i in kept])
    return spots[kept], sparse.csr_matrix((np.ones(len(index)), (spot, index)), shape=(len(kept), len(xy)))


def _adata(counts: Any, places: np.ndarray, genes: Any, platform: str) -> Any:
    import anndata as ad

    adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32))
    adata.var_names = genes
    adata.obs_names = [f"{platform}_{i}" for i in range(adata.n_obs)]
    adata.obs["library_id"] = platform
    adata.obsm["spatial"] = np.asarray(places, dtype=np.float64)
    return adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()


def recall(source: np.ndarray, target: np.ndarray, match: np.ndarray, *, rng: int = 0) -> dict[int, float]:
    """Return recall@k: ``match`` is the row of ``source`` at the place of each row of ``target``."""
    generator = np.random.default_rng(rng)
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (source, target)]
    ranks = []
    for query, right in enumerate(match):
        others = generator.choice(np.delete(np.arange(len(source)), right), GALLERY - 1, replace=False)
        similarity = unit[0][others] @ unit[1][query]
        ranks.append(int((similarity >= unit[0][right] @ unit[1][query]).sum()))
    return {k: float(np.mean(np.array(ranks) < k)) for k in TOP}


def _pairs(platforms: dict[str, Any], seed: int) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yield source, target, queries (rows of the target) and the row of the source at the same place."""
    for source, target in PAIRS:
        distance, nearest = cKDTree(platforms[source].obsm["spatial"]).query(platforms[target].obsm["spatial"])
        reach = 0.6 * SPOTS.get(source, (30.0,))[0]
        inside = np.flatnonzero(distance <= reach)
        queries = np.random.default_rng(seed).permutation(inside)[:QUERIES]
        yield source, target, queries, nearest[queries]


def embeddings(platforms: dict[str, Any], source: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return embeddings of all platforms by rows that have seen the source alone, each platform's mean taken out."""
    from sklearn.decomposition import PCA

    model = sf.tl.train(
        as_slides(platforms[source], mpp=1.0), "storm-small", stage="mask", config={"image": None, "linear_blend": 0.0},
        genes="all", validation=None, rng=seed, recipe=RECIPE,
    )  # fmt: skip
    logged = {name: simple.log_counts(adata) for name, adata in platforms.items()}
    components = PCA(30, random_state=seed).fit(logged[source])
    made: dict[str, dict[str, np.ndarray]] = {"STORM": {}, "STORM, mean of the window's tokens": {}}
    made |= {"PCA 30 of the shared genes": {}, "PCA 30 averaged over self + ring 1": {}}
    for name, adata in platforms.items():
        one = adata.copy()
        sf.tl.embed(one, model, mpp=1.0)
        made["STORM"][name] = one.obsm["X_stfm"]
        made["STORM, mean of the window's tokens"][name] = one.obsm["X_stfm_niche"]
        scores = components.transform(logged[name])
        made["PCA 30 of the shared genes"][name] = scores
        made["PCA 30 averaged over self + ring 1"][name] = ring_means(
            scores, ring_graphs(adata.obsm["spatial"], 1)[0], with_self=True
        )
    return {row: {name: x - x.mean(axis=0) for name, x in found.items()} for row, found in made.items()}


def transfer_table(seeds: Sequence[int], save: Save, *, data: Path | None = None) -> pd.DataFrame:
    """Score every row on every pair of platforms; a seed is another toy tissue. Saved after each seed."""
    lines: list[dict[str, Any]] = []
    if data is not None:
        lines += real.scored(data, seeds, recall, QUERIES)
    for seed in seeds:
        platforms = measure(seed)
        made: dict[str, Any] = {}
        for source, target, queries, match in _pairs(platforms, seed):
            if source not in made:
                read = {source} | {other for first, other in PAIRS if first == source}
                made[source] = embeddings({name: platforms[name] for name in read}, source, seed)
            for row, found in made[source].items():
                scored = recall(found[source], found[target][queries], match, rng=seed)
                lines += [
                    {"source": source, "target": target, "row": row, "seed": seed, "k": k, "recall": value}
                    for k, value in scored.items()
                ]
        table = pd.DataFrame(lines)
        print(seed, table[table["k"] == 5].groupby("row", sort=False)["recall"].mean().round(3).to_dict(), flush=True)
        save(table)
    return pd.DataFrame(lines)


def show(scores: pd.DataFrame) -> str:
    """Return the table: recall of each row and pair, mean ± spread over tissues, beside chance."""
    lines = []
    for (source, target), pair in scores.groupby(["source", "target"], sort=False):
        for row, one in pair.groupby("row", sort=False):
            cells = one.groupby("k")["recall"].agg(["mean", "std"]).fillna(0.0)
            lines.append([f"{source} → {target}", row, *(f"{m:.3f} ± {s:.3f}" for m, s in cells.to_numpy())])
        lines.append([f"{source} → {target}", "chance", *(f"{k / GALLERY:.3f}" for k in TOP)])
    return markdown(["trained on → embedded", "row", *(f"recall@{k} of {GALLERY}" for k in TOP)], lines)
