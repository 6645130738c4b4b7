"""Places of tokens in µm: an absolute position, and an attention bias learned from the way between two tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RelativeBias", "ScaledPosition", "grid_centres", "within"]


class ScaledPosition(nn.Module):
    """Absolute position of a token: ``LayerNorm(Linear(xy))`` with xy in µm, so that it knows the resolution.

    Parameters
    ----------
    width
        Width of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, xy_um: Tensor) -> Tensor:
        """Return ``(..., width)`` from ``(..., 2)``."""
        return self.norm(self.linear(xy_um))  # type: ignore[no-any-return]


class RelativeBias(nn.Module):
    """Attention bias from the way between two tokens: an MLP from (dx, dy) in µm to one number a head.

    Parameters
    ----------
    heads
        Heads of the attention.
    hidden
        Width of the layer between.
    """

    def __init__(self, heads: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.GELU(), nn.Linear(hidden, heads))

    def forward(self, xy_um: Tensor, context_um: Tensor | None = None, *, place: Tensor | None = None) -> Tensor:
        """Return the bias ``(b, heads, t, s)``.

        Parameters
        ----------
        xy_um
            Places of the tokens, ``(b, t, 2)``; b is 1 where all samples have the same.
        context_um
            Places of what is attended to, ``(b, s, 2)``; the tokens themselves by default.
        place
            int64 ``(b, k)``: the tokens are these rows of ``xy_um`` (then ``(1, t, 2)``), and the bias is
            ``(b, heads, k, k)``. The MLP runs once for all samples.
        """
        other = xy_um if context_um is None else context_um
        bias: Tensor = self.layers(xy_um[:, :, None] - other[:, None]).permute(0, 3, 1, 2)
        if place is None:
            return bias
        return bias[0][:, place[:, :, None], place[:, None, :]].transpose(0, 1)


def grid_centres(side: int, extent_um: float) -> Tensor:
    """Return the centres of ``side`` x ``side`` cells that fill a square, float32 ``(side * side, 2)``.

    Rows of cells follow each other; x is the first number; the corner of the square is (0, 0).
    """
    step = (torch.arange(side) + 0.5) * (extent_um / side)
    y, x = torch.meshgrid(step, step, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def within(sites_um: Tensor, cells_um: Tensor, radius_um: float) -> Tensor:
    """Return which cells lie under which sites, bool ``(b, sites, cells)``.

    Parameters
    ----------
    sites_um, cells_um
        ``(b, s, 2)`` and ``(c, 2)``.
    radius_um
        Largest distance between the centres.
    """
    way = sites_um[:, :, None] - cells_um
    return way.square().sum(dim=-1) <= radius_um**2
