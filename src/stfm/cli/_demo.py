"""``stfm demo``: the whole way of a slide, measured on tissue that the model has not seen."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stfm._keys import DOMAIN, EMBEDDING, PREDICTED
from stfm.cli._baselines import colour_ridge, log_expression
from stfm.cli._report import Report, Row
from stfm.cli._tissue import open_tissue

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from stfm.cli._tissue import Tissue
    from stfm.models import Model

MODEL = "st-align-small"
GENES = "hvg50"  # predicted from H&E: the most variable ones of the training tissue
N_NEIGHBORS = 6  # all of the first ring on the hexagonal lattice
PCA = "X_pca"


def run(dataset: str, *, out: Path, seed: int) -> Report:
    """Run the demo and leave figures, ``report.md`` and ``report.json`` in a folder.

    Parameters
    ----------
    dataset
        ``"toy"`` or a real section with H&E, such as ``"her2st:C2"``.
    out
        Folder of the results; made if it is not there.
    seed
        Seed of tissue, model and baselines.

    Returns
    -------
    What was measured.
    """
    from rich.console import Console

    from stfm.cli import _demo_figures, _report

    console = Console()
    seconds: dict[str, float] = {}
    with _step("tissue", seconds, console):
        tissue = open_tissue(dataset, seed)
    out.mkdir(parents=True, exist_ok=True)
    report = Report(dataset, seed, tissue.words, seconds=seconds)
    with _step("niches and tiles", seconds, console):
        prepare(tissue)
    with _step(f"train {MODEL}", seconds, console):
        model = train(tissue, seed)
    with _step("embed the held-out tissue", seconds, console):
        embed(tissue, model)
    with _step("spatial domains", seconds, console):
        report.domains = find_domains(tissue, seed)
    with _step("expression from H&E", seconds, console):
        predict(tissue, model, report, seed)
    with _step("figures", seconds, console):
        figures = _demo_figures.draw(tissue, model, report.genes, out)
    _report.write(report, out, figures)
    console.print()
    _report.show(report, console)
    total = sum(seconds.values())
    console.print(f"{total:.0f} s; figures and report.md are in {out}/", markup=False, highlight=False)
    return report


@contextmanager
def _step(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    # whole lines: a warning or an error may follow at any time
    console.print(f"{name} ...", markup=False, highlight=False)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    console.print(f"  {seconds[name]:.1f} s", highlight=False)


def prepare(tissue: Tissue) -> None:
    """Build niches and lay tiles on every slide."""
    from stfm import pp

    for slide in (*tissue.train, tissue.test):
        pp.build_niches(slide, N_NEIGHBORS)
        pp.tile(slide)


def train(tissue: Tissue, seed: int) -> Model:
    """Train the model on the training slides only; one of them, or its patient, chooses the best epoch."""
    from stfm import tl
    from stfm.training.recipes import recipe_for

    recipe = recipe_for(MODEL).replace(stain_jitter=0.2)  # stains differ between patients
    return tl.train(tissue.train, MODEL, recipe=recipe, rng=seed)


def embed(tissue: Tissue, model: Model) -> None:
    """Embed the held-out slide, and give it the PCA of its genes as a baseline."""
    import scanpy as sc

    from stfm import tl

    tl.embed(tissue.test, model)
    plain = tissue.test.copy()
    sc.pp.normalize_total(plain, target_sum=1e4)
    sc.pp.log1p(plain)
    sc.pp.pca(plain, n_comps=min(30, plain.n_obs - 1, plain.n_vars - 1), random_state=0)
    tissue.test.obsm[PCA] = plain.obsm["X_pca"]


def find_domains(tissue: Tissue, seed: int) -> list[Row]:
    """Cluster the held-out slide by every representation alike and score it where the truth is known."""
    from stfm import metrics, tl

    test = tissue.test
    truth = None if tissue.truth is None else test.obs[tissue.truth]
    n_domains = 7 if truth is None else truth.nunique()
    rows = []
    for method, rep, rings, key in (
        ("ST-Align", EMBEDDING, 0, DOMAIN),
        ("ST-Align, averaged over neighbours", EMBEDDING, 1, "domain_spatial"),
        ("PCA of genes", PCA, 0, "domain_pca"),
        ("PCA of genes, averaged over neighbours", PCA, 1, "domain_spatial_pca"),
    ):
        tl.spatial_domains(test, n_domains, use_rep=rep, smooth_rings=rings, key_added=key, rng=seed)
        if truth is not None:
            rows.append(Row(method, metrics.ari(truth, test.obs[key]), ours=rep == EMBEDDING))
    return rows


def predict(tissue: Tissue, model: Model, report: Report, seed: int) -> None:
    """Predict the genes of the held-out slide from its H&E, by the model and by baselines, and score them."""
    from stfm import metrics, tl

    test = tissue.test

    def score(method: str, predicted: NDArray[np.float32], *, ours: bool = False) -> NDArray[np.float64]:
        r: NDArray[np.float64] = metrics.gene_pearson(log_expression(test, report.genes), predicted)
        report.expression.append(Row(method, float(r.mean()), ours=ours))
        return r

    order = None
    for method, features, key in (
        ("ST-Align, ridge on its image features", model, PREDICTED),
        ("ridge on image features of random weights", _untrained(model, seed), "predicted_random"),
    ):
        tl.predict_expression(
            test,
            reference=tissue.train,
            genes=report.genes or GENES,
            features=features,
            rings=0,
            key_added=key,
            rng=seed,
        )
        report.genes = list(test.obsm[key].columns)
        r = score(method, test.obsm[key].to_numpy(), ours=features is model)
        order = r.argsort()[::-1] if order is None else order
    score("ridge on colours around the spot", colour_ridge(tissue.train, test, report.genes))
    columns = test.var_names.get_indexer(report.genes)
    report.ceiling = float(metrics.noise_ceiling(test.X, columns=columns, rng=seed).mean())
    report.genes = [report.genes[place] for place in order] if order is not None else report.genes


def _untrained(model: Model, seed: int) -> Model:
    """Return the same architecture with random weights: what it is worth without any training."""
    import torch

    from stfm import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.create(model.config, model.vocabulary)
