"""Swin Transformer behind a convolutional stem, as CTransPath is published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.layouts import SWIN_LAYOUTS
from stfm.encoders.image.pooling import Pooling
from stfm.encoders.image.vit import FeedForward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


class ConvStem(nn.Module):
    """Two 3 × 3 convolutions of stride 2 and a 1 × 1 in place of one 4 × 4 of stride 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = width // 8
        self.proj = nn.Sequential(
            nn.Conv2d(3, first, 3, 2, 1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, 2 * first, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * first),
            nn.ReLU(),
            nn.Conv2d(2 * first, width, 1),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, h, w, d)``."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Self-attention inside windows with a learned bias for every relative position."""

    index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_positions(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return windows ``(n, t, d)``; ``mask`` is added to the scores, ``(windows, 1, t, t)``."""
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index.flatten()].view(t, t, self.heads).permute(2, 0, 1)
        bias = bias.unsqueeze(0)
        if mask is not None:
            bias = (bias + mask).repeat(n // len(mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(n, t, d))  # type: ignore[no-any-return]


class SwinBlock(nn.Module):
    """Attention in windows, shifted in every second block, and a feed-forward."""

    mask: Tensor | None

    def __init__(self, width: int, heads: int, window: int, shift: int, side: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width)
        self.register_buffer("mask", shift_mask(side, window, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, h, w, d)``."""
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), dims=(1, 2))
        y = from_windows(self.attn(to_windows(y, self.window), self.mask), self.window, x.shape)
        if self.shift:
            y = y.roll((self.shift, self.shift), dims=(1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, h / 2, w / 2, 2 d)``; the order of the four is down first, then right."""
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Blocks at one resolution, after a downsampling in all but the first."""

    def __init__(self, width: int, depth: int, heads: int, window: int, side: int, *, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else Downsample(width // 2)
        shift = window // 2 if side > window else 0
        self.blocks = nn.Sequential(*(SwinBlock(width, heads, window, shift * (i % 2), side) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, h, w, d)``."""
        return self.blocks(self.downsample(x))  # type: ignore[no-any-return]


class Swin(nn.Module):
    """Swin Transformer with a convolutional stem, parameters named as in timm 1; mean over the last map.

    Parameters
    ----------
    image_px
        Side of the tile, px; 32 times the window, or the window's multiple of it.
    width, depths, heads, window
        Width of the first stage (it doubles), blocks and heads of the stages, side of a window in tokens.
    pooling, stages
        See :class:`~stfm.encoders.image.pooling.Pooling`.
    """

    layouts = SWIN_LAYOUTS

    def __init__(
        self,
        *,
        image_px: int,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        pooling: str = "mean",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        n = len(depths)
        smallest = window * 2 ** (n + 1)
        if len(heads) != n or width % 8 or image_px % smallest:
            msg = (
                f"depths and heads must be equally long, width a multiple of 8 and input_px of {smallest}: "
                f"{list(depths)}, {list(heads)}, {width}, {image_px}."
            )
            raise InputError(msg)
        widths = [width * 2**i for i in range(n)]
        if any(one % many for one, many in zip(widths, heads, strict=True)):
            msg = f"heads must divide the widths of their stages, {widths}, got {list(heads)}."
            raise InputError(msg)
        self.pool = Pooling(pooling, widths=widths, stages=stages)
        self.patch_embed = ConvStem(width)
        self.layers = nn.ModuleList(
            Stage(width * 2**i, depths[i], heads[i], window, image_px // 2 ** (i + 2), first=i == 0) for i in range(n)
        )
        self.norm = nn.LayerNorm(width * 2 ** (n - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        x = self.patch_embed(x)
        stages = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.pool.takes(i):
                stages.append(self.pool.moments(x.flatten(1, 2)))
        return self.pool.join(stages, patches=self.norm(x).flatten(1, 2))


def relative_positions(window: int) -> Tensor:
    """Return the row of the bias table for every pair of tokens of a window, int64 ``(t, t)``."""
    place = torch.arange(window)
    y, x = (one.flatten() for one in torch.meshgrid(place, place, indexing="ij"))
    rows, columns = (one[:, None] - one[None, :] + window - 1 for one in (y, x))
    return rows * (2 * window - 1) + columns


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Return what keeps tokens of opposite borders apart in shifted windows, float ``(windows, 1, t, t)``."""
    edge = torch.zeros(side, dtype=torch.int64)
    edge[side - window : side - shift], edge[side - shift :] = 1, 2
    region = (3 * edge[:, None] + edge[None, :]).view(1, side, side, 1)
    regions = to_windows(region, window).squeeze(-1)
    apart = regions[:, None, :, None] != regions[:, None, None, :]
    return torch.zeros(apart.shape).masked_fill(apart, -100.0)


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cut ``(b, h, w, d)`` into windows, ``(b n, t, d)``."""
    b, h, w, d = x.shape
    x = x.view(b, h // window, window, w // window, window, d)
    return x.transpose(2, 3).reshape(-1, window * window, d)


def from_windows(x: Tensor, window: int, shape: Sequence[int]) -> Tensor:
    """Put windows together again, ``(b, h, w, d)``."""
    b, h, w, d = shape
    return x.view(b, h // window, w // window, window, window, d).transpose(2, 3).reshape(b, h, w, d)


def swin(
    spec: EncoderSpec,
    *,
    width: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build a Swin Transformer; options as in :class:`Swin`."""
    backbone = Swin(
        image_px=spec.input_px or 224,
        width=width,
        depths=depths,
        heads=heads,
        window=window,
        pooling=pooling or spec.pooling or "mean",
        stages=stages,
    )
    return ImageEncoder(spec, backbone, width=backbone.pool.width)
