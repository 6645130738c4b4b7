"""Attention with an additive bias; blocks in which modalities share attention and keep their own feed-forwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Attention", "DistanceBias", "DropPath", "ExpertBlock", "FeedForward", "alibi_slopes"]


def alibi_slopes(heads: int) -> Tensor:
    """Return the slopes of ALiBi (Press et al., 2022), float32 ``(heads,)``.

    For a power of two they are ``2^(-8 i / heads)``, i = 1..heads; otherwise those of the power of two below, and
    every second one of the power of two above.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    if power < heads:
        finer = [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
        slopes += finer[: heads - power]
    return torch.tensor(slopes)


class DistanceBias(nn.Module):
    """ALiBi on physical distance: a head's bias falls linearly with the µm between two spots.

    The bias is 0 at distance 0, symmetric, and the same for a shifted or turned slide, so one model reads any platform.

    Parameters
    ----------
    heads
        Number of heads; each has a slope of its own (:func:`alibi_slopes`).
    unit_um
        Distance in µm that counts as one step: the pitch of Visium.
    learned
        Whether training may change the slopes (kept positive).
    """

    def __init__(self, heads: int, *, unit_um: float = 100.0, learned: bool = False) -> None:
        super().__init__()
        check_positive("unit_um", unit_um)
        self.unit_um = unit_um
        self.log_slopes = nn.Parameter(alibi_slopes(heads).log(), requires_grad=learned)

    def forward(self, xy_um: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return the bias, ``(b, heads, w, w)``, of windows of spots.

        Parameters
        ----------
        xy_um
            Coordinates, ``(b, w, 2)`` or ``(b, w, 3)``.
        padding
            bool ``(b, w)``, True where there is no spot; nothing attends to these.
        """
        # Differences instead of torch.cdist, which goes through a matrix product and rounds small distances away.
        distance = (xy_um[:, :, None] - xy_um[:, None]).float().square().sum(dim=-1).sqrt()
        bias: Tensor = -self.log_slopes.exp()[:, None, None] * (distance / self.unit_um)[:, None]
        return bias if padding is None else mask_keys(bias, padding)


def mask_keys(bias: Tensor, padding: Tensor) -> Tensor:
    """Return the bias ``(b, h, t, s)`` with -inf at padded keys (``padding`` bool ``(b, s)``).

    A window without any token keeps its bias, since a softmax over nothing has no value; nobody reads the result.
    """
    dead = padding & ~padding.all(dim=1, keepdim=True)
    return bias.masked_fill(dead[:, None, None, :], float("-inf"))


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context, with an additive bias.

    Parameters
    ----------
    width, heads
        Width of a token and number of heads.
    qkv_bias
        Whether the maps to queries, keys and values have offsets.
    dropout
        On the attention weights.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            msg = f"width must be a multiple of heads, got {width} and {heads}."
            raise InputError(msg)
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
        """Return ``(b, t, d)``; ``bias`` broadcasts to ``(b, heads, t, s)``, -inf where nothing is attended to."""
        source = x if context is None else context
        q, k, v = self._split(self.q(x)), self._split(self.k(source)), self._split(self.v(source))
        dropout = self.dropout if self.training else 0.0
        bias = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between them.

    Parameters
    ----------
    width, hidden
        Width of a token and of the layer between.
    dropout
        After each layer.
    """

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )


class DropPath(nn.Module):
    """Leaves out a residual branch for a random share of the samples in training (stochastic depth).

    Parameters
    ----------
    share
        Share of the samples that lose the branch.
    """

    def __init__(self, share: float = 0.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch, scaled so that its expectation stays."""
        if self.share == 0 or not self.training:
            return x
        keep = 1 - self.share
        return x * (torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < keep).to(x.dtype) / keep


class ExpertBlock(nn.Module):
    """A pre-norm block: attention over the tokens of all modalities, then a feed-forward for each modality.

    Parameters
    ----------
    width, heads, hidden
        Width of a token, heads, width of a feed-forward.
    n_experts
        Feed-forwards; 1 shares one between the modalities.
    own_norms
        Whether the norm before attention is each modality's own too.
    qkv_bias, dropout
        Of attention (and dropout of the feed-forwards).
    drop_path
        See :class:`DropPath`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        n_experts: int = 2,
        own_norms: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_experts if own_norms else 1))
        self.attention = Attention(width, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.expert_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_experts))
        self.experts = nn.ModuleList(FeedForward(width, hidden, dropout=dropout) for _ in range(n_experts))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, experts: Sequence[int], sizes: Sequence[int], *, bias: Tensor | None = None) -> Tensor:
        """Return ``(b, t, d)``.

        Parameters
        ----------
        x
            Tokens, those of one modality side by side.
        experts, sizes
            Which expert each run of tokens goes to, and how long the runs are; the sizes sum to t.
        bias
            Of the attention.
        """
        x = x + self.drop_path(self.attention(self._each(self.norms, x, experts, sizes), bias=bias))
        branch = [
            self.experts[min(e, len(self.experts) - 1)](self.expert_norms[min(e, len(self.experts) - 1)](part))
            for e, part in zip(experts, x.split(list(sizes), dim=1), strict=True)
        ]
        out: Tensor = x + self.drop_path(torch.cat(branch, dim=1))
        return out

    @staticmethod
    def _each(modules: nn.ModuleList, x: Tensor, experts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        if len(modules) == 1:
            return modules[0](x)  # type: ignore[no-any-return]
        parts = x.split(list(sizes), dim=1)
        return torch.cat([modules[e](part) for e, part in zip(experts, parts, strict=True)], dim=1)
