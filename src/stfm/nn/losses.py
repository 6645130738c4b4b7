"""Contrastive losses of ST-Align (paper, eqs. 10-12) and of the CLIP baselines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice, check_positive, check_range
from stfm.nn.gather import gather_rows

if TYPE_CHECKING:
    from stfm.nn.batch import Batch

DENOMINATORS = ("all", "negatives")
NEGATIVES = ("batch", "slide")


class Temperature(nn.Module):
    """Temperature τ of a softmax over similarities, learned as ``log(1 / τ)`` and clamped, or fixed.

    Parameters
    ----------
    value
        τ at the start.
    learned
        Learn it; otherwise it stays at ``value``.
    minimum, maximum
        A learned τ stays between these two; 0.01 is CLIP's bound (logit scale 100).
    """

    log_scale: Tensor

    def __init__(
        self, value: float = 0.07, *, learned: bool = True, minimum: float = 0.01, maximum: float = 1.0
    ) -> None:
        super().__init__()
        check_positive("temperature", value)
        if learned:
            check_range("temperature", value, minimum, maximum)
        self.learned = learned
        self.bounds = (-math.log(maximum), -math.log(minimum))
        start = torch.tensor(-math.log(value))
        if learned:
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start)

    def forward(self) -> Tensor:
        """Return 1 / τ, the factor of the similarities, a scalar."""
        log_scale = self.log_scale.clamp(*self.bounds) if self.learned else self.log_scale
        return log_scale.exp()


def contrastive_loss(
    query: Tensor,
    key: Tensor,
    *,
    scale: Tensor | float = 1 / 0.07,
    denominator: str = "all",
    symmetric: bool = True,
    normalise: bool = True,
    excluded: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """Contrastive loss between two views of the same spots (eqs. 10 and 11), mean over the queries.

    Row ``i`` of ``query`` belongs to row ``i`` of ``key``. When several devices train together, the keys (and, for
    the symmetric form, the queries) of all devices are candidates.

    Parameters
    ----------
    query, key
        Embeddings, ``(n, d)`` each.
    scale
        1 / τ.
    denominator
        ``"all"``: positive and negatives (InfoNCE). ``"negatives"``: the negatives alone, as eqs. 10 and 11 are
        printed; this has no lower bound, and a query without negatives is left out.
    symmetric
        Average the direction key -> query with query -> key, as eq. 10 does; eq. 11 has one direction.
    normalise
        L2-normalise both, so that the dot product is the cosine.
    excluded
        Pairs that are no negatives of each other, bool ``(n, n_all)``, ``n_all`` rows of all devices; the positive
        pair is kept whatever this says. See :func:`excluded_pairs`.
    gather
        Take candidates from all devices.

    Returns
    -------
    Scalar.

    Raises
    ------
    InputError
        Shapes differ, or ``denominator="negatives"`` and no query has a negative.
    """
    check_choice("denominator", denominator, DENOMINATORS)
    if query.shape != key.shape or query.ndim != 2:
        msg = f"query and key must be (n, d) of one shape, got {tuple(query.shape)} and {tuple(key.shape)}."
        raise InputError(msg)
    with torch.autocast(query.device.type, enabled=False):  # sums of exponentials need 32 bits
        query, key = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (query, key))
        if normalise:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        all_query, all_key, first = _candidates(query, key) if gather else (query, key, 0)
        positive = torch.arange(len(query), device=query.device) + first
        loss = _one_way(scale * query @ all_key.T, positive, denominator, excluded)
        if symmetric:
            loss = (loss + _one_way(scale * key @ all_query.T, positive, denominator, excluded)) / 2
    return loss


def _candidates(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int]:
    (all_query, all_key), first = gather_rows(query, key)
    return cast("Tensor", all_query), cast("Tensor", all_key), first


def _one_way(logits: Tensor, positive: Tensor, denominator: str, excluded: Tensor | None) -> Tensor:
    """Return the mean over queries of ``-log(exp(s⁺ / τ) / Σ exp(s / τ))``."""
    is_positive = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, positive[:, None], value=True)
    if excluded is not None:
        logits = logits.masked_fill(excluded & ~is_positive, -math.inf)
    s_positive = logits.gather(1, positive[:, None]).squeeze(1)
    if denominator == "all":
        return (torch.logsumexp(logits, dim=1) - s_positive).mean()
    negatives = logits.masked_fill(is_positive, -math.inf)
    usable = torch.isfinite(negatives).any(dim=1)
    if not bool(usable.any()):
        msg = (
            f"denominator='negatives' needs at least one negative a query, and none of {len(logits)} has one: "
            "use a larger batch, negatives='batch', or denominator='all'."
        )
        raise InputError(msg)
    return (torch.logsumexp(negatives[usable], dim=1) - s_positive[usable]).mean()


def excluded_pairs(
    batch: Batch, *, negatives: str = "batch", mask_overlap: bool = False, gather: bool = True
) -> Tensor | None:
    """Return which pairs of spots must not be negatives of each other.

    Parameters
    ----------
    batch
        ``slide_id`` is needed for ``negatives="slide"``; ``slide_id``, ``index`` and ``niche_index`` for
        ``mask_overlap``.
    negatives
        ``"batch"``: every other spot; ``"slide"``: other spots of the same slide only.
    mask_overlap
        Leave out spots whose niche (with the spot itself) shares a spot with the query's.
    gather
        Candidates are the spots of all devices, as in :func:`contrastive_loss`.

    Returns
    -------
    bool ``(n, n_all)``, or None where nothing is left out.
    """
    check_choice("negatives", negatives, NEGATIVES)
    if negatives == "batch" and not mask_overlap:
        return None
    slide = _needed(batch.slide_id, "slide_id")
    members = None
    if mask_overlap:
        members = torch.cat([_needed(batch.index, "index")[:, None], _needed(batch.niche_index, "niche_index")], dim=1)
    all_slide, all_members = slide, members
    if gather:
        (gathered, all_members), _ = gather_rows(slide, members)
        all_slide = slide if gathered is None else gathered
    same_slide = slide[:, None] == all_slide[None, :]
    excluded = ~same_slide if negatives == "slide" else torch.zeros_like(same_slide)
    if members is not None and all_members is not None:
        excluded |= same_slide & _share_member(members, all_members)
    return excluded


def _share_member(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return whether two rows of non-negative indices share one, ``(n, m)``; -1 is padding."""
    shared = torch.zeros(len(ours), len(theirs), dtype=torch.bool, device=ours.device)
    for column in ours.T:  # one column at a time: (n, m, k) instead of (n, m, k, k)
        hit = (column[:, None, None] == theirs[None, :, :]).any(dim=2)
        shared |= hit & (column >= 0)[:, None]
    return shared


def _needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        msg = f"The batch has no {name!r}; it is needed to choose negatives. Use negatives='batch', mask_overlap=False."
        raise InputError(msg)
    return tensor


def check_weights(lambda1: float, lambda2: float) -> None:
    """Refuse weights of eq. 12 that are negative or sum to more than 1."""
    check_range("lambda1", lambda1, 0.0, 1.0)
    check_range("lambda2", lambda2, 0.0, 1.0)
    if lambda1 + lambda2 > 1.0 + 1e-12:
        msg = f"lambda1 + lambda2 must be at most 1 (eq. 12 gives the rest to L_NS), got {lambda1} + {lambda2}."
        raise InputError(msg)


def weighted_total(spot: Tensor, niche: Tensor, spot_niche: Tensor, *, lambda1: float, lambda2: float) -> Tensor:
    """Return ``λ1 L_CL^s + λ2 L_CL^n + (1 - λ1 - λ2) L_NS`` (eq. 12)."""
    check_weights(lambda1, lambda2)
    return lambda1 * spot + lambda2 * niche + (1.0 - lambda1 - lambda2) * spot_niche
