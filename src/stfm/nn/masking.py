"""Which tokens are shown in masked pretraining; image and expression complement each other."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hide_positions", "show_sites"]


def hide_positions(n: int, n_positions: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Choose the positions that hide one modality (and so show the other), the same number in every sample.

    Parameters
    ----------
    n, n_positions
        Samples, and positions in each.
    share
        Share of the positions that are chosen, rounded; at least one is, and at least one is not.
    generator
        Random numbers; the global ones by default.

    Returns
    -------
    bool ``(n, n_positions)`` on the CPU.
    """
    chosen = min(max(round(share * n_positions), 1), max(n_positions - 1, 1))
    rank = torch.rand(n, n_positions, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < chosen


def show_sites(present: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Choose the sites whose expression is shown, an exact share of all sites of a batch.

    Parameters
    ----------
    present
        bool ``(b, s)``, which sites there are.
    share
        Share that is shown, rounded; where there are two sites or more, one is shown and one hidden at least.
    generator
        Random numbers; the global ones by default.

    Returns
    -------
    bool ``(b, s)`` on the CPU, False where there is no site.
    """
    present = present.cpu()
    n = int(present.sum())
    shown = min(max(round(share * n), 1), n - 1) if n > 1 else 0
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, 2.0).flatten().argsort()
    out = torch.zeros(present.numel(), dtype=torch.bool)
    out[order[:shown]] = True
    return out.view_as(present)
