"""A quick baseline that stands beside the model in the demo: ridge regression on the colours around a spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

CONTEXTS_UM = (112.0, 224.0, 448.0)
PX = 16
ALPHAS = (1.0, 10.0, 100.0, 1000.0)


def log_expression(adata: AnnData, genes: Sequence[str]) -> NDArray[np.float32]:
    """Return ``log1p(1e4 c / sum c)`` of some genes, the sum over all measured genes: what is predicted."""
    from stfm.slide.normalise import log_normalise

    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    chosen: NDArray[np.float32] = log_normalise(adata[:, list(genes)].X.tocsr(), totals).toarray()
    return chosen


def colour_features(adata: AnnData) -> NDArray[np.float64]:
    """Return mean, spread and edges of each colour in squares of three sizes around every spot, ``(n, 27)``."""
    from stfm.slide import as_slides

    (slide,) = as_slides(adata, modalities=("image",))
    rows, found = np.arange(slide.n_obs), []
    for size_um in CONTEXTS_UM:
        pixels = slide.tiles.read(rows, size_um=size_um, size_px=PX).astype(np.float64) / 255.0
        edges = np.abs(np.diff(pixels, axis=1)).mean(axis=(1, 2)) + np.abs(np.diff(pixels, axis=2)).mean(axis=(1, 2))
        found += [pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2)), edges]
    return np.concatenate(found, axis=1)


def colour_ridge(train: Sequence[AnnData], test: AnnData, genes: Sequence[str]) -> NDArray[np.float32]:
    """Fit ridge regression from colours to genes on the training slides and predict the held-out one."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=ALPHAS))
    model.fit(
        np.concatenate([colour_features(slide) for slide in train]),
        np.concatenate([log_expression(slide, genes) for slide in train]),
    )
    predicted: NDArray[np.float32] = np.asarray(model.predict(colour_features(test)), dtype=np.float32)
    return predicted
