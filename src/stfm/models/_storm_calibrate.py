"""How large STORM's errors are on spots that it did not learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stfm.models._sample import sample_spots

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from stfm.models._storm_linear import WindowRegression
    from stfm.models.base import Model
    from stfm.models.inputs import SlideInputs

_BATCH = 256
#: spots of all slides together that the errors are measured on
_MAX_SPOTS = 4000
#: spots below which the errors of a gene say nothing by themselves
_FEWEST = 20
_LIMITS = (0.1, 10.0)
#: least variance of latent expression around what is expected
_LEAST = 0.05


@torch.no_grad()
def fit_calibration(
    model: Model, slides: Sequence[SlideInputs], *, held_out: bool, linear: WindowRegression | None
) -> Tensor | None:
    """Return the factor of each gene by which the deviation of a prediction has the size of its error, ``(G,)``.

    The factor is the root mean square of ``(measured - predicted) / deviation``, with predictions as they are made for
    new slides: from H&E alone, or without it from the counts of the other spots of the window. Errors on training
    slides are smaller than those on new ones; there the factor is raised to the errors that the regression on windows
    had on the sections that were left out of it.

    Parameters
    ----------
    model
        In evaluation mode, its calibration all ones.
    slides
        With counts, and with H&E where any has it; others are left out.
    held_out
        Whether the model did not learn from them.
    linear
        Its regression on windows, which knows errors on left-out sections.

    Returns
    -------
    The factors; those of genes that were not measured are the median of the others. None without counts.
    """
    slides = [slide for slide in slides if slide.has_gene]
    if not slides:
        return None
    slides = [slide for slide in slides if slide.has_image] or slides
    n = torch.zeros(len(model.written_genes()), dtype=torch.float64)
    error, expected = torch.zeros_like(n), torch.zeros_like(n)
    for slide, chosen in sample_spots(slides, _MAX_SPOTS):
        there = torch.from_numpy(slide.measured_genes)
        for start in range(0, len(chosen), _BATCH):
            index = chosen[start : start + _BATCH]
            squares, variance = _errors(model, slide, index)
            n += len(index) * there
            error += squares.sum(dim=0).double() * there
            expected += variance.mean(dim=0).double() * len(index) * there
    enough = (n >= min(_FEWEST, float(n.max()))) & (n > 0)
    factor = (error / n.clamp_min(1.0)).sqrt()
    if not held_out and linear is not None and bool(linear.fitted):
        typical = (expected / n.clamp_min(1.0)).sqrt().clamp_min(1e-6)
        factor = torch.maximum(factor, linear.deviation.cpu().double() / typical)
    factor[~enough] = factor[enough].median()
    return factor.clamp(*_LIMITS).float()


@torch.no_grad()
def fit_expected_variance(model: Any, slides: Sequence[SlideInputs]) -> Tensor:
    """Return the mean square of latent expression around what is expected from H&E and neighbours, ``(e,)``.

    Of the latent expression that the gene table reads from a spot's own counts; at most 1, the variance that the table
    gives it to begin with.
    """
    slides = [slide for slide in slides if slide.has_gene]
    squares, n = torch.zeros(model.config.gene_width, dtype=torch.float64), 0
    for slide, chosen in sample_spots(slides, _MAX_SPOTS):
        for start in range(0, len(chosen), _BATCH):
            batch = slide.batch(chosen[start : start + _BATCH]).to(model.calibration.device)
            windows, counts = model.windows(batch), batch.counts
            if counts is None:
                continue
            rows = windows.rows[:, 0]
            read = model.latent(counts[rows], None if batch.gene_mask is None else batch.gene_mask[rows])
            squares += (read - model.expected(windows)).square().sum(dim=0).double().cpu()
            n += len(rows)
    return (squares / max(n, 1)).clamp(_LEAST, 1.0).float()


def _errors(model: Model, slide: SlideInputs, index: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return squared errors in units of the predicted variance, and that variance, ``(b, G)`` each."""
    batch = slide.batch(index).to(next(model.parameters()).device)
    prediction = model.predict(batch.without("gene") if batch.has_image else batch)
    measured = torch.from_numpy(slide.expression(index))
    mean, variance = prediction.mean.float().cpu(), prediction.deviation.float().cpu().square().clamp_min(1e-8)
    return (measured - mean).square() / variance, variance
