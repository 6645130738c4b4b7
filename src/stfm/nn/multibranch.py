"""Encoder with branches for two modalities, and decoders of one modality; tokens have places in µm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stfm.nn.attention import Attention, ExpertBlock, FeedForward, mask_keys
from stfm.nn.positions import RelativeBias

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CrossStack", "Stack", "centre_weights"]


class BiasedBlock(nn.Module):
    """An :class:`~stfm.nn.attention.ExpertBlock` with a relative bias of its own.

    Parameters
    ----------
    width, heads, hidden, n_experts, drop_path
        Of the block.
    bias_hidden
        Of the bias.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, n_experts: int, drop_path: float, bias_hidden: int
    ) -> None:
        super().__init__()
        self.bias = RelativeBias(heads, bias_hidden)
        self.block = ExpertBlock(width, heads, hidden, n_experts=n_experts, qkv_bias=False, drop_path=drop_path)

    def forward(
        self,
        x: Tensor,
        experts: Sequence[int],
        sizes: Sequence[int],
        xy_um: Tensor,
        place: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """Return ``(b, t, d)``."""
        bias = self.bias(xy_um, place=place)
        if padding is not None:
            bias = mask_keys(bias.expand(len(x), -1, -1, -1), padding)
        return self.block(x, experts, sizes, bias=bias)  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Blocks in which modalities have feed-forwards of their own, then blocks in which they share one, then a norm.

    Parameters
    ----------
    width, heads, hidden
        Width of a token, heads, width of a feed-forward.
    depth, specific
        All blocks, and those of them (the first) with a feed-forward and its norm for each of two modalities.
    drop_path
        Share of samples that leave out a branch of the last block; it grows linearly from 0 at the first.
    bias_hidden
        Of the relative biases.
    checkpointing
        Compute a block again in the backward pass instead of keeping what it computed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        *,
        specific: int = 0,
        drop_path: float = 0.0,
        bias_hidden: int = 64,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(
            BiasedBlock(
                width,
                heads,
                hidden,
                n_experts=2 if i < specific else 1,
                drop_path=drop_path * i / max(depth - 1, 1),
                bias_hidden=bias_hidden,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        xy_um: Tensor,
        *,
        experts: Sequence[int] = (0,),
        sizes: Sequence[int] | None = None,
        place: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Return ``(b, t, d)``.

        Parameters
        ----------
        x
            Tokens, those of one modality side by side.
        xy_um
            Their places, ``(b, t, 2)`` or ``(1, t, 2)``.
        experts, sizes
            Modality of each run of tokens, and how long the runs are.
        place
            As in :class:`~stfm.nn.positions.RelativeBias`.
        padding
            bool ``(b, t)``, True where a token is hidden; nothing attends to it.
        """
        runs = [x.shape[1]] if sizes is None else list(sizes)
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, experts, runs, xy_um, place, padding, use_reentrant=False)
            else:
                x = block(x, experts, runs, xy_um, place, padding)
        return self.norm(x)  # type: ignore[no-any-return]


class CrossBlock(nn.Module):
    """Cross-attention from queries to a context, then a feed-forward; relative bias between both.

    Parameters
    ----------
    width, heads, hidden, bias_hidden
        As in :class:`Stack`.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, bias_hidden: int) -> None:
        super().__init__()
        self.bias = RelativeBias(heads, bias_hidden)
        self.norm, self.context_norm, self.last_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads, qkv_bias=False)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor, context: Tensor, xy_um: Tensor, padding: Tensor | None) -> Tensor:
        """Return ``(b, t, d)``."""
        bias = self.bias(xy_um)
        if padding is not None:
            bias = mask_keys(bias.expand(len(x), -1, -1, -1), padding)
        x = x + self.attention(self.norm(x), self.context_norm(context), bias=bias)
        return x + self.feed_forward(self.last_norm(x))  # type: ignore[no-any-return]


class CrossStack(nn.Module):
    """Decoder whose queries are places that look at the tokens which were encoded.

    Parameters
    ----------
    width, heads, hidden, depth, bias_hidden, checkpointing
        As in :class:`Stack`.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, depth: int, *, bias_hidden: int = 64, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads, hidden, bias_hidden=bias_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Tensor, positions: Tensor, xy_um: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """Return one token for every place, ``(b, t, d)``; ``positions`` are those of the queries."""
        x = (self.query + positions).expand(len(context), -1, -1)
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, context, xy_um, padding, use_reentrant=False)
            else:
                x = block(x, context, xy_um, padding)
        return self.norm(x)  # type: ignore[no-any-return]


def centre_weights(module: nn.Module, deviation: float = 0.02) -> None:
    """Draw the weights of all linear layers from a normal distribution around 0; offsets are 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, deviation)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
