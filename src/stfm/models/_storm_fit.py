"""What STORM takes from the training slides before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from stfm.models._slots import MAX_FIT_SPOTS, fit_limit, sample_spots
from stfm.models._storm_field import lags
from stfm.models._storm_linear import window_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stfm.models._storm_linear import WindowRegression
    from stfm.models._storm_tokens import FeatureScaler, ImageTokens
    from stfm.models.inputs import SlideInputs
    from stfm.nn.gene_table import GeneTable

_BATCH = 256
#: nearest spots among which those a pitch away are looked for: more than a ring of any lattice has
_RING = 18
#: spots whose scaled features are kept in memory
_MAX_KEPT = 1_000_000


@dataclass(frozen=True)
class Sample:
    """Some spots of the training slides, slide after slide.

    Attributes
    ----------
    x
        Log-normalised expression, ``(n, G)``.
    totals
        Counts a spot, ``(n,)``.
    mask
        Which genes were measured, bool ``(n, G)``; None: all.
    slide
        Number of the slide of each spot, ``(n,)``.
    coords
        Coordinates of the spots of each slide.
    """

    x: Tensor
    totals: Tensor
    mask: Tensor | None
    slide: Tensor
    coords: list[NDArray[np.float64]]

    @classmethod
    def of(cls, slides: Sequence[SlideInputs], n_genes: int, *, patch: bool = False) -> Sample:
        """Read so many spots of slides with counts as fit into memory: at random, or a ``patch`` of each slide."""
        values, masks, totals, groups, coords = [], [], [], [], []
        for slide, index in sample_spots(slides, fit_limit(n_genes), patch=patch):
            batch = slide.spots(index)
            if batch.counts is None or batch.totals is None:
                continue
            values.append(batch.counts)
            totals.append(batch.totals)
            groups.append(torch.full((len(index),), slide.slide_id, dtype=torch.int64))
            none_absent = torch.ones_like(batch.counts, dtype=torch.bool)
            masks.append(none_absent if batch.gene_mask is None else batch.gene_mask)
            coords.append(slide.slide.coords[index])
        mask = torch.cat(masks)
        whole = bool(mask.all())
        return cls(torch.cat(values), torch.cat(totals), None if whole else mask, torch.cat(groups), coords)

    def graph(self) -> Tensor:
        """Return which spots are neighbours, sparse ``(n, n)``, symmetric; the entries of each slide sum to its spots.

        Neighbours are a pitch apart: the ring around a spot on a lattice.
        """
        blocks = [_neighbours(np.asarray(places, dtype=np.float64)) for places in self.coords]
        joined = sparse.block_diag(blocks, format="coo")
        places = torch.from_numpy(np.stack([joined.row, joined.col]).astype(np.int64))
        return torch.sparse_coo_tensor(places, torch.from_numpy(joined.data), joined.shape, check_invariants=True)


def _neighbours(coords: NDArray[np.float64]) -> sparse.csr_matrix:
    n = len(coords)
    if n < 2:
        return sparse.csr_matrix(np.zeros((n, n), np.float32))
    table, lag, _ = lags(coords, _RING)
    i, k = np.nonzero(lag == 1)
    graph = sparse.csr_matrix((np.ones(len(i), np.float32), (i, table.index[i, k])), shape=(n, n))
    return (graph + graph.T) * (n / max(2 * len(i), 1))


def fit_table(table: GeneTable, slides: Sequence[SlideInputs], *, within: bool = False) -> float:
    """Fit the gene table on a sample of the spots, or on differences ``within`` slides; return their median total."""
    sample = Sample.of(slides, len(table.known))
    device = table.embedding.device
    table.cpu().fit(sample.x, sample.totals, sample.mask, groups=sample.slide if within else None)
    table.to(device)
    return float(sample.totals.median())


def learn_genes(table: GeneTable, sample: Sample) -> int:
    """Let the gene table learn genes that it does not know yet; return how many."""
    device = table.embedding.device
    learned = table.cpu().learn(sample.x, sample.totals, sample.mask)
    table.to(device)
    return learned


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
