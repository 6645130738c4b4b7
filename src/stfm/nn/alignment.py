"""Losses that draw the image and the expression of the same place together: contrast and matching."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stfm.nn.gather import gather_rows

__all__ = ["match_loss", "place_contrast", "sample_contrast"]


def sample_contrast(image: Tensor, gene: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """Contrast the samples at each place ("inter"); the samples of all devices are candidates.

    Parameters
    ----------
    image, gene
        ``(b, p, d)``; place j of one belongs to place j of the other.
    valid
        bool ``(b, p)``, which places count.
    temperature
        τ; similarities are cosines.

    Returns
    -------
    Scalar, the mean of both directions over all places that have another sample to be told from; else 0.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, gene = _units(image), _units(gene)
        (all_image, all_gene, all_valid), first = gather_rows(image.flatten(1), gene.flatten(1), valid.to(torch.uint8))
        candidates = [cast("Tensor", t).unflatten(1, image.shape[1:]) for t in (all_image, all_gene)]
        keys = cast("Tensor", all_valid).bool().T
        forth = torch.einsum("bpd,cpd->pbc", image, candidates[1]) / temperature
        back = torch.einsum("bpd,cpd->pbc", gene, candidates[0]) / temperature
        return (_info_nce(forth, valid.T, keys, first) + _info_nce(back, valid.T, keys, first)) / 2


def place_contrast(image: Tensor, gene: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    """Contrast the places of each sample ("intra"); arguments and result as in :func:`sample_contrast`."""
    with torch.autocast(image.device.type, enabled=False):
        logits = _units(image) @ _units(gene).mT / temperature
        return (_info_nce(logits, valid, valid, 0) + _info_nce(logits.mT, valid, valid, 0)) / 2


def match_loss(image: Tensor, gene: Tensor, *, temperature: float) -> Tensor:
    """Tell pairs from non-pairs: binary cross-entropy on the matrix of similarities of the samples.

    Parameters
    ----------
    image, gene
        ``(b, d)``; row i of one belongs to row i of the other.
    temperature
        τ; the logit of a pair is its cosine over τ.

    Returns
    -------
    Scalar; pairs and non-pairs have equal weight, however many there are.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = _units(image) @ _units(gene).T / temperature
        pair = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, pair.to(logits.dtype), reduction="none")
        same = loss.diagonal().mean()
        if len(logits) < 2:
            return same
        return (same + loss.masked_fill(pair, 0.0).sum() / (len(logits) * (len(logits) - 1))) / 2


def _units(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def _info_nce(logits: Tensor, queries: Tensor, keys: Tensor, first: int) -> Tensor:
    """Return the mean of ``logsumexp(s) - s⁺``; ``logits`` (p, b, c), query i belongs to key ``first + i``."""
    number = torch.arange(logits.shape[1], device=logits.device)
    positive = logits[:, number, number + first]
    masked = logits.masked_fill(~keys[:, None, :], -math.inf)
    usable = queries & (keys.sum(dim=1, keepdim=True) > 1)
    # What is not usable may have no finite entry at all: it is set to a number before the logarithm, for its gradient.
    masked = torch.where(usable[:, :, None], masked, 0.0)
    loss = torch.where(usable, masked.logsumexp(dim=2) - positive, 0.0)
    return loss.sum() / usable.sum().clamp_min(1)
