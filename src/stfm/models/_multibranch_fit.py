"""What the multi-branch STORM takes from slides beside its weights: colours, genes, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from stfm.models._sample import sample_spots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from stfm.models.base import Model
    from stfm.models.inputs import SlideInputs

_FIT_TILES = 64  # tiles a slide from which the scale of the pixels is taken
_SMALLEST = 0.02  # deviation of a channel from 0 to 1: less is an empty slide
_MAX_SPOTS = 4000  # spots of all slides together that errors are measured on
_BATCH = 128


def colour_scale(slides: Sequence[SlideInputs]) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation of the channels (0 to 1) over some tiles of each slide; None without H&E."""
    rng = np.random.default_rng(0)
    pixels = []
    for slide in slides:
        if slide.has_image:
            index = rng.choice(slide.n_obs, size=min(slide.n_obs, _FIT_TILES), replace=False)
            pixels.append(slide.tiles(np.sort(index).astype(np.int64), "spot").reshape(-1, 3))
    if not pixels:
        return None
    values = np.concatenate(pixels).astype(np.float64) / 255
    return torch.from_numpy(values.mean(axis=0)), torch.from_numpy(values.std(axis=0)).clamp_min(_SMALLEST)


@torch.no_grad()
def squared_errors(model: Model, slides: Sequence[SlideInputs], n_genes: int) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of each gene predicted from H&E alone, and the spots that it was measured on."""
    slides = [slide for slide in slides if slide.has_gene and slide.has_image]
    n, total = torch.zeros(n_genes, dtype=torch.float64), torch.zeros(n_genes, dtype=torch.float64)
    device = next(model.parameters()).device
    for slide, chosen in sample_spots(slides, _MAX_SPOTS):
        there = torch.from_numpy(slide.measured_genes).double()
        for start in range(0, len(chosen), _BATCH):
            index = chosen[start : start + _BATCH]
            predicted = model.predict(slide.batch(index).without("gene").to(device)).mean.cpu()
            error = (torch.from_numpy(slide.expression(index)) - predicted).double().square().sum(dim=0)
            n += len(index) * there
            total += error * there
    return total / n.clamp_min(1), n
