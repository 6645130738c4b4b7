"""The HEST-Benchmark as its code runs it (HEST afd42c3), beside which the repaired protocols of stfm stand.

As its code does, other than its text: targets are log1p of raw counts, without a library size; the genes are chosen on
all sections, those that are tested too; the ridge has no intercept and a penalty that follows from sizes,
100 / (components * genes), whatever was asked for; Pearson r pools the sections of a fold's test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

import stfm as sf
from stfm.slide import Slide
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Vocabulary

N_GENES, N_COMPONENTS = 50, 256
MIN_SPOTS = 0.1


def hest_targets(slides: Mapping[str, Slide]) -> dict[str, np.ndarray]:
    """Return log1p of raw counts of the 50 genes, ``(n, 50)`` a section."""
    import anndata as ad
    import scanpy as sc

    shared = Vocabulary.from_panels([slide.panel for slide in slides.values()], mode="intersection")
    counts = {n: match_genes(s.panel, shared, min_fraction=0.0).take(s.counts.to_csr()) for n, s in slides.items()}
    often = np.all([(c > 0).sum(axis=0) >= np.ceil(MIN_SPOTS * c.shape[0]) for c in counts.values()], axis=0).ravel()
    tables = {name: np.log1p(c[:, np.flatnonzero(often)].toarray()).astype(np.float32) for name, c in counts.items()}
    stacked = ad.AnnData(np.concatenate(list(tables.values())))
    stacked.uns["log1p"] = {"base": None}
    sc.pp.highly_variable_genes(stacked, n_top_genes=N_GENES)
    chosen = np.flatnonzero(stacked.var["highly_variable"].to_numpy())[:N_GENES]
    return {name: table[:, chosen] for name, table in tables.items()}


def hest_fold(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], y_train: Sequence[np.ndarray], y_test: Sequence[np.ndarray]
) -> float:
    """Return the mean Pearson r over genes of one fold; a constant prediction counts as 0 (there: not a number)."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = np.concatenate(train), np.concatenate(y_train)
    steps = make_pipeline(StandardScaler(), PCA(min(N_COMPONENTS, *x.shape), random_state=1))
    x = steps.fit_transform(x)
    ridge = Ridge(alpha=100 / (x.shape[1] * y.shape[1]), fit_intercept=False, solver="lsqr", max_iter=1000)
    guess = ridge.fit(x, y).predict(steps.transform(np.concatenate(test)))
    return float(sf.metrics.gene_pearson(np.concatenate(y_test), guess).mean())


def run_hest(protocol: str, targets: Mapping[str, np.ndarray], features: Mapping[str, np.ndarray]) -> float:
    """Return the score of features under the folds of a protocol of stfm, with HEST's targets and regression."""
    scores = [
        hest_fold(
            [features[n] for n in fold.train], [features[n] for n in fold.test],
            [targets[n] for n in fold.train], [targets[n] for n in fold.test],
        )
        for fold in sf.metrics.get_protocol(protocol).folds
    ]  # fmt: skip
    return float(np.mean(scores))
