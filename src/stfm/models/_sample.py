"""Spots of the training slides from which something is estimated before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from stfm.models._pitches import pitches_apart

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from stfm.models.inputs import SlideInputs

__all__ = ["MAX_FIT_SPOTS", "Sample", "around_middle", "fit_limit", "genes_measured", "sample_spots"]

#: what is estimated from training slides looks at no more than this
MAX_FIT_SPOTS = 20_000
MAX_FIT_VALUES = 100_000_000
#: nearest spots among which those a pitch away are looked for: more than a ring of any lattice has
_RING = 18


def fit_limit(n_genes: int) -> int:
    """Return how many spots of so many genes are held in memory to fit something on."""
    return max(2, min(MAX_FIT_SPOTS, MAX_FIT_VALUES // n_genes))


def sample_spots(
    slides: Sequence[SlideInputs], most: int, *, patch: bool = False
) -> Iterator[tuple[SlideInputs, NDArray[np.int64]]]:
    """Yield each slide with positions of some of its spots, the same share of all, about ``most`` together.

    They are drawn at random, or are the ``patch`` around the middle of the slide, whose spots have their neighbours.
    """
    share = min(1.0, most / max(1, sum(s.n_obs for s in slides)))
    rng = np.random.default_rng(0)
    for slide in slides:
        size = min(slide.n_obs, max(2, int(share * slide.n_obs)))
        chosen = around_middle(slide.slide.coords, size) if patch else rng.choice(slide.n_obs, size, replace=False)
        yield slide, np.sort(chosen).astype(np.int64)


def around_middle(coords: NDArray[np.floating], size: int) -> NDArray[np.int64]:
    """Return the positions of the places nearest to the middle of all, in rising order."""
    distance = np.linalg.norm(coords - np.median(coords, axis=0), axis=1)
    return np.sort(np.argsort(distance, kind="stable")[:size])


def genes_measured(slides: Sequence[SlideInputs], n_genes: int, *, paired: bool = False) -> Tensor:
    """Return which genes of the vocabulary some slide has measured, of ``paired`` one that has H&E too, ``(G,)``."""
    found = np.zeros(n_genes, dtype=bool)
    for slide in slides:
        if slide.has_gene and (slide.has_image or not paired):
            found |= slide.measured_genes
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Sample:
    """Some spots of the training slides, slide after slide.

    Attributes
    ----------
    x
        Log-normalised expression on the vocabulary, float32 ``(n, G)``.
    totals
        Counts a spot, float32 ``(n,)``.
    mask
        Which genes were measured, bool ``(n, G)``; None: all.
    slide
        Number of the slide of each spot, int64 ``(n,)``.
    coords
        Coordinates of the spots of each slide in µm, ``(n_slide, 2)`` or ``(n_slide, 3)``.
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
    """Return the symmetric graph of one slide; its entries sum to its spots."""
    n = len(coords)
    if n < 2:
        return sparse.csr_matrix(np.zeros((n, n), np.float32))
    table, steps, _ = pitches_apart(coords, _RING)
    i, k = np.nonzero(steps == 1)
    graph = sparse.csr_matrix((np.ones(len(i), np.float32), (i, table.index[i, k])), shape=(n, n))
    return (graph + graph.T) * (n / max(2 * len(i), 1))
