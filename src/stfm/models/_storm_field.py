"""STORM's latent expression as a field over the tissue: each component is averaged as far as it reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from stfm.models._pitches import pitches_apart
from stfm.models._sample import around_middle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stfm.models.inputs import SlideInputs
    from stfm.nn.gene_table import GeneTable

__all__ = ["LatentField", "fit_field", "read_latent"]

#: neighbours whose products with a spot tell how far a component reaches: four rings of a hexagonal lattice
_NEIGHBOURS = 60
#: a covariance is taken at distances up to so many pitches
_LAGS = 4
#: ranges that are tried, in pitches
_RANGES = np.geomspace(0.7, 40.0, 40)
#: least share of a component's variance that is noise, which keeps the systems well posed
_NOISE = 0.02
#: variance, in units of the component's, of a place that was not measured
_UNSEEN = 1e6
#: spots of a slide that weigh as much as all of training
_PRIOR = 1000
#: spots of a slide that are read, those around its middle where there are more
_MAX_SPOTS = 20_000
_BATCH = 256


class LatentField(nn.Module):
    """Best linear prediction of what neighbours share of each latent component (simple kriging).

    A component of the latent expression is a field over the tissue plus what a spot has for itself (counting noise,
    single cells): ``Cov(u(s), u(t)) = sill exp(-|s - t| / range)`` between two spots, and ``total`` at one. A component
    that reaches far (layers of a cortex) is averaged over the window, one that changes from spot to spot is left as it
    is, and one without a field vanishes. No labels and no number of rings enter.

    Parameters
    ----------
    width
        Number of components.
    """

    sill: Tensor
    total: Tensor
    reach_um: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("sill", torch.zeros(width))
        self.register_buffer("total", torch.ones(width))
        self.register_buffer("reach_um", torch.ones(width))

    def fit(self, latents: Sequence[NDArray[np.floating]], coords: Sequence[NDArray[np.floating]]) -> None:
        """Learn sill and range of each component from slides.

        The sill is what the covariance of neighbours says of distance 0, so that what a spot shares with none of them
        does not count; it is fitted by least squares, weighted by pairs of spots.

        Parameters
        ----------
        latents
            Components of all spots of each slide, ``(n, e)``.
        coords
            Their coordinates, the same unit as later in windows.
        """
        lags: list[NDArray[np.float64]] = []
        variance = np.zeros(latents[0].shape[1])
        for values, places in zip(latents, coords, strict=True):
            centred = np.asarray(values, dtype=np.float64) - np.mean(values, axis=0, dtype=np.float64)
            variance += (centred**2).sum(axis=0)
            lags.append(_covariances(centred, np.asarray(places, dtype=np.float64)))
        total = np.maximum(variance / sum(map(len, latents)), 1e-12)
        sill, reach = _fit_exponential(np.concatenate(lags), total)
        for buffer, found in ((self.sill, sill), (self.total, total), (self.reach_um, reach)):
            buffer.copy_(torch.from_numpy(found))

    def adapted(self, latent: NDArray[np.floating], coords: NDArray[np.floating]) -> LatentField:
        """Return a field between what training told and what one slide tells of itself, by its number of spots.

        Parameters
        ----------
        latent, coords
            Of the slide, as of :meth:`fit`.
        """
        own = LatentField(len(self.sill))
        own.fit([latent], [coords])
        share = len(latent) / (len(latent) + _PRIOR)
        for name, buffer in own.named_buffers():
            buffer.lerp_(getattr(self, name).cpu(), 1 - share)
        return own.to(self.sill.device)

    def forward(self, latent: Tensor, xy_um: Tensor, seen: Tensor) -> Tensor:
        """Return the field at the first place of each window, ``(b, e)``.

        Parameters
        ----------
        latent
            Components in each place of the windows, ``(b, w, e)``.
        xy_um
            Coordinates, ``(b, w, 2)`` or ``(b, w, 3)``.
        seen
            Which places were measured, bool ``(b, w)``; the others have no say.
        """
        with torch.autocast(latent.device.type, enabled=False):
            xy = xy_um.float()
            distance = torch.cdist(xy, xy, compute_mode="donot_use_mm_for_euclid_dist")
            shared = self.sill[:, None, None] * torch.exp(-distance[:, None] / self.reach_um[:, None, None])
            own = (self.total - self.sill).clamp_min(0.0)[None, :, None] + self.total[None, :, None] * (
                _UNSEEN * (~seen)[:, None, :].float()
            )
            weights = torch.linalg.solve(shared + torch.diag_embed(own), shared[:, :, :, 0])
            values = torch.where(seen[..., None], latent.float(), 0.0)
            return torch.einsum("bew,bwe->be", weights, values)


def _covariances(values: NDArray[np.float64], coords: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows of (mean distance, pairs, pitch, mean product of each component), one for each whole pitch."""
    if len(coords) < 2:
        return np.empty((0, values.shape[1] + 3))
    table, steps, pitch = pitches_apart(coords, _NEIGHBOURS)
    rows = []
    for step in range(1, _LAGS + 1):
        i, k = np.nonzero(steps == step)
        if len(i):
            product = np.einsum("ij,ij->j", values[i], values[table.index[i, k]]) / len(i)
            rows.append([float(table.distance[i, k].mean()), float(len(i)), pitch, *product])
    return np.array(rows).reshape(-1, values.shape[1] + 3)


def _fit_exponential(
    lags: NDArray[np.float64], total: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sill and range of each component; the range is found on a grid, the sill to it in closed form."""
    if not len(lags):
        return np.zeros_like(total), np.ones_like(total)
    distance, pairs, covariance = lags[:, 0], lags[:, 1], lags[:, 3:]
    ranges = _RANGES * np.average(lags[:, 2], weights=pairs)
    basis = np.exp(-distance[None] / ranges[:, None])
    weighted = basis * pairs
    sills = (weighted @ covariance) / (weighted * basis).sum(axis=1, keepdims=True)
    sills = np.clip(sills, 0.0, (1 - _NOISE) * total)
    left = covariance[None] - sills[:, None] * basis[..., None]
    best = (pairs[None, :, None] * left**2).sum(axis=1).argmin(axis=0)
    return sills[best, np.arange(len(total))], ranges[best]


def fit_field(field: LatentField, table: GeneTable, slides: Sequence[SlideInputs]) -> None:
    """Learn how far the components that a gene table reads reach on the training slides."""
    read = [found for slide in slides if (found := read_latent(table, slide)) is not None]
    if read:
        field.fit([latent for latent, _ in read], [coords for _, coords in read])


@torch.no_grad()
def read_latent(table: GeneTable, slide: SlideInputs) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
    """Return what the gene table reads of a slide's spots, with their coordinates; None of fewer than two."""
    places = slide.slide.coords
    index = around_middle(places, _MAX_SPOTS)
    if slide.measured is not None:
        index = index[slide.measured[index]]
    if len(index) < 2:
        return None
    parts = []
    for start in range(0, len(index), _BATCH):
        rows = index[start : start + _BATCH]
        counts = torch.from_numpy(slide.expression(rows)).to(table.embedding.device)
        mask = torch.from_numpy(slide.measured_genes).to(counts.device).expand(len(rows), -1)
        parts.append(table.read(counts, mask).cpu())
    return torch.cat(parts).numpy(), places[index]
