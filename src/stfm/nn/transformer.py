"""Transformer blocks with the parameter names of ``torch.nn.TransformerEncoder``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, the activation of CLIP's published weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation."""
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention; parameters named as those of ``nn.MultiheadAttention``.

    Unlike that class it has no second code path in evaluation, so what is put in place of a linear layer (LoRA) is
    used always.

    Parameters
    ----------
    width, heads
        Width of a token and number of heads.
    dropout
        On the attention weights.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            msg = f"width must be a multiple of heads, got {width} and {heads}."
            raise InputError(msg)
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return ``(b, t, d)``; ``padding`` is bool ``(b, t)``, True where there is no token."""
        b, t, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        keep = None if padding is None else ~padding[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward, each with a residual.

    Parameters
    ----------
    width, heads, hidden
        Width of a token, heads, width of the feed-forward.
    dropout
        On attention weights, in the feed-forward and on both residuals.
    norm_first
        Normalise before each part (steadier training) or after it (Vaswani et al., scGPT).
    activation
        ``"gelu"`` or ``"relu"``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        dropout: float = 0.1,
        norm_first: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.norm_first = norm_first
        self.self_attn = SelfAttention(width, heads, dropout=dropout)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return ``(b, t, d)``."""
        if self.norm_first:
            x = x + self.dropout(self.self_attn(self.norm1(x), padding))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.dropout(self.self_attn(x, padding)))
        return self.norm2(x + self._feed_forward(x))  # type: ignore[no-any-return]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))  # type: ignore[no-any-return]


class TransformerEncoder(nn.Module):
    """A stack of :class:`TransformerLayer` under the name ``layers``.

    Parameters
    ----------
    width, heads, hidden, depth
        Width of a token, heads, width of the feed-forward, number of layers.
    dropout, norm_first, activation
        As in :class:`TransformerLayer`; with ``norm_first`` a last normalisation follows.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        *,
        dropout: float = 0.1,
        norm_first: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, hidden, dropout=dropout, norm_first=norm_first, activation=activation)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if norm_first else None

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return ``(b, t, d)``; ``padding`` is bool ``(b, t)``, True where there is no token."""
        for layer in self.layers:
            x = layer(x, padding)
        return x if self.norm is None else self.norm(x)
