"""Trained on ST slides (breast cancer, olfactory bulb), embedding Visium (cortex): how often a place is found again.

No tissue at hand was measured on both platforms, but cortex 151673 and 151674 are neighbouring sections of one block:
the same place was measured twice, by a platform that the model never saw. A query is a spot of one section; the right
answer is the spot at its place in the other, among others drawn at random, as in ``_storm_transfer``. The sections were
laid over each other by a rotation and a shift, chosen so that the layers that people drew agree (87 % of the spots);
no embedding took part in that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

import stfm as sf
from stfm.inference.rings import ring_graphs, ring_means
from stfm.slide import Slide, as_slides
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Vocabulary
from stfm.training.recipes import RECIPES

NAME = "ST (breast, bulb)", "Visium (cortex 151673, 151674)"
SOURCES = ("her2st:C1", "her2st:D1", "her2st:H1", "mob:1", "mob:2")
SECTIONS = ("151673", "151674")
#: degrees about the middle of the first section, and µm, that bring it onto the second
ROTATION, SHIFT = 2.0, (0.0, 150.0)
REACH_UM = 60.0
RECIPE = RECIPES["storm-small"].replace(max_steps=100, batches="slide")


def sources(data: Path) -> list[Slide]:
    """Read the counts of the ST slides."""
    with sf.settings.override(cache_dir=data / "cache", offline=True):
        return [as_slides(sf.datasets.load(name), modalities=("gene",))[0] for name in SOURCES]


def same_places(first: Slide, second: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the second section, and those of the first that lie at the same place."""
    angle = np.deg2rad(ROTATION)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = first.coords.mean(axis=0)
    laid = (first.coords - middle) @ turn.T + middle + SHIFT
    distance, nearest = cKDTree(laid).query(second.coords)
    queries = np.flatnonzero(distance <= REACH_UM)
    return queries, nearest[queries]


def logged(slide: Slide, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return log counts of a slide on a vocabulary, float32 ``(n, G)``, and which genes it has measured."""
    match = match_genes(slide.panel, vocabulary, min_fraction=0)
    counts = np.asarray(match.take(slide.counts.to_csr()).todense(), dtype=np.float32)
    return np.log1p(1e4 * counts / np.maximum(slide.counts.totals(), 1)[:, None]), match.mask


def embeddings(train: list[Slide], targets: dict[str, Any], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return embeddings of the two sections by row, each section's mean taken out."""
    from sklearn.decomposition import PCA

    vocabulary = sf.models.load("default").vocabulary  # of the packaged model the names alone: symbols and ids
    model = sf.models.create("storm-small", vocabulary, image=None, linear_blend=0.0, within_slides=True)
    model = sf.tl.train(train, model, stage="mask", validation=None, rng=seed, recipe=RECIPE)
    read = [logged(slide, vocabulary) for slide in train]
    slides = {name: as_slides(adata, modalities=("gene",))[0] for name, adata in targets.items()}
    shown = {name: logged(slide, vocabulary) for name, slide in slides.items()}
    # of the bulb's 1,000 genes the others are 0 in every spot, and so say nothing
    shared = np.logical_and.reduce([mask for _, mask in (*read[:1], *shown.values())])
    centred = np.concatenate([(x - x.mean(axis=0))[:, shared] for x, _ in read])
    components = PCA(30, random_state=seed).fit(centred)
    own = PCA(30, random_state=seed).fit(np.concatenate([(x - x.mean(axis=0))[:, shared] for x, _ in shown.values()]))
    rows = ("STORM", "STORM, mean of the window's tokens", "PCA 30 of the training slides",
            "PCA 30 of the training slides, averaged over self + ring 1", "PCA 30 of the cortex itself")  # fmt: skip
    made: dict[str, dict[str, np.ndarray]] = {row: {} for row in rows}
    for name, adata in targets.items():
        one = adata.copy()
        sf.tl.embed(one, model)
        x = shown[name][0][:, shared]
        scores = components.transform(x - x.mean(axis=0))
        graph = ring_graphs(slides[name].coords, 1)[0]
        found = (one.obsm["X_stfm"], one.obsm["X_stfm_niche"], scores, ring_means(scores, graph, with_self=True),
                 own.transform(x - x.mean(axis=0)))  # fmt: skip
        for row, values in zip(rows, found, strict=True):
            made[row][name] = values - values.mean(axis=0)
    return made


def scored(
    data: Path, seeds: Sequence[int], recall: Callable[..., dict[int, float]], n_queries: int
) -> Iterator[dict[str, Any]]:
    """Yield a line a row, seed and k."""
    from _expression import read_dlpfc

    targets = {name: read_dlpfc(data, name) for name in SECTIONS}
    first, second = (as_slides(adata, modalities=("gene",))[0] for adata in targets.values())
    queries, match = same_places(first, second)
    train = sources(data)
    for seed in seeds:
        chosen = np.random.default_rng(seed).permutation(len(queries))[:n_queries]
        for row, found in embeddings(train, targets, seed).items():
            values = recall(found[SECTIONS[0]], found[SECTIONS[1]][queries[chosen]], match[chosen], rng=seed)
            for k, value in values.items():
                yield {"source": NAME[0], "target": NAME[1], "row": row, "seed": seed, "k": k, "recall": value}
