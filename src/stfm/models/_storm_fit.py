"""What STORM takes from the training slides before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stfm.models._sample import MAX_FIT_SPOTS, Sample, genes_measured, sample_spots
from stfm.models._storm_linear import window_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stfm.models._storm_linear import WindowRegression
    from stfm.models._storm_tokens import FeatureScaler, ImageTokens
    from stfm.models.inputs import SlideInputs
    from stfm.nn.gene_table import GeneTable

_BATCH = 256
#: spots whose scaled features are kept in memory
_MAX_KEPT = 1_000_000


def fit_table(table: GeneTable, slides: Sequence[SlideInputs], *, within: bool = False) -> float:
    """Fit the gene table on a sample of the spots, or on differences ``within`` slides; return their median total."""
    sample = Sample.of(slides, len(table.known))
    device = table.embedding.device
    table.cpu().fit(sample.x, sample.totals, sample.mask, groups=sample.slide if within else None)
    table.to(device)
    return float(sample.totals.median())


def learn_genes(table: GeneTable, slides: Sequence[SlideInputs]) -> None:
    """Let the gene table learn genes that it does not know yet, where the slides have any."""
    device = table.embedding.device
    if bool((genes_measured(slides, len(table.known)).to(device) & ~table.known).any()):
        sample = Sample.of(slides, len(table.known))
        table.cpu().learn(sample.x, sample.totals, sample.mask)
        table.to(device)


def fit_image_scale(image: ImageTokens, slides: Sequence[SlideInputs]) -> None:
    """Fit scale and components of the features of a frozen encoder; a trained one keeps running statistics."""
    if not image.encoder.frozen:
        return
    shown = [slide for slide in slides if slide.has_image]
    if shown:
        scaler: FeatureScaler = image.scaler  # type: ignore[assignment]
        scaler.fit(torch.cat([_raw(image, slide, index) for slide, index in sample_spots(shown, MAX_FIT_SPOTS)]))


def keep_scaled_features(image: ImageTokens, slides: Sequence[SlideInputs]) -> None:
    """Replace kept features of a frozen encoder by what the scaler makes of them, which is narrower."""
    for slide in slides:
        features = slide.spot_features
        if not slide.has_image or features is None or features.shape[1] == image.width or slide.n_obs > _MAX_KEPT:
            continue
        scaled = np.empty((slide.n_obs, image.width), np.float32)
        for start in range(0, slide.n_obs, _BATCH):
            index = np.arange(start, min(start + _BATCH, slide.n_obs))
            scaled[index] = image.scaled(_raw(image, slide, index)).cpu().numpy()
        slide.take_features(scaled)


def fit_window_regression(linear: WindowRegression, image: ImageTokens, slides: Sequence[SlideInputs]) -> None:
    """Fit the regression from window features to expression on the slides that have both."""
    shown = [slide for slide in slides if slide.has_image]
    if not shown or not image.encoder.frozen:
        return
    x, y, there, coords = [], [], [], []
    for slide, index in sample_spots(shown, MAX_FIT_SPOTS):
        x.append(_window_features(image, slide, index))
        y.append(torch.from_numpy(slide.expression(index)))
        there.append(torch.from_numpy(slide.measured_genes).expand(len(index), -1))
        coords.append(slide.slide.coords[index])
    linear.fit(x, _filled(y, there), coords)


def _filled(y: list[Tensor], there: list[Tensor]) -> list[Tensor]:
    """Put the mean of the spots that measured a gene where it was not measured, so that it pulls nowhere."""
    measured = torch.cat(there).to(y[0].dtype)
    mean = (torch.cat(y) * measured).sum(dim=0) / measured.sum(dim=0).clamp_min(1.0)
    return [torch.where(kept, part, mean) for part, kept in zip(y, there, strict=True)]


@torch.no_grad()
def _window_features(image: ImageTokens, slide: SlideInputs, index: NDArray[np.int64]) -> Tensor:
    """Return what the regression reads of some spots, ``(b, 3 f)``; the spots of their windows are encoded once."""
    window = slide.windows[index]
    spots, place = np.unique(np.maximum(window, 0), return_inverse=True)
    scaled = image.scaled(_raw(image, slide, spots.astype(np.int64))).cpu()
    rows = torch.from_numpy(place.reshape(window.shape))
    xy = torch.from_numpy(slide.slide.coords[spots].astype(np.float32))
    return window_features(scaled[rows], xy[rows], torch.from_numpy(window >= 0))


@torch.no_grad()
def _raw(image: ImageTokens, slide: SlideInputs, index: NDArray[np.int64]) -> Tensor:
    """Return raw features of some spots, on the encoder's device: those that are kept, else computed."""
    device = image.encoder.mean.device
    parts = []
    for start in range(0, len(index), _BATCH):
        features, tiles = slide.shown(index[start : start + _BATCH], "spot")
        if features is not None:
            parts.append(features.to(device))
        elif tiles is not None:
            parts.append(image.encode(tiles.to(device)))
    return torch.cat(parts)
