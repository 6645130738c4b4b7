"""Expression that a model writes by itself: genes found, slides streamed."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError
from stfm._progress import progress
from stfm.inference.features import use_frozen_features
from stfm.inference.stream import run_blocks
from stfm.models.inputs import SlideInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from stfm.models.base import Model
    from stfm.slide.slide import Slide

__all__ = ["genes_written", "nearest_genes", "predict_slides"]


def predict_slides(
    model: Model,
    slides: Sequence[Slide],
    genes: NDArray[np.int64],
    *,
    measured: Sequence[NDArray[np.bool_] | None] | None = None,
    own: bool = False,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    cache: bool = True,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return expected log-normalised expression and its deviation on each slide, float32 ``(n, g)`` each.

    Parameters
    ----------
    model
        A model that writes expression.
    slides
        With H&E, counts or both; what is on them is used.
    genes
        Positions in the model's vocabulary.
    measured
        For each slide, the spots whose counts may be used; None: all that it has.
    own
        Whether a spot's own counts may be used for it.
    batch_size, device
        As of :func:`~stfm.inference.stream.embed_blocks`.
    cache
        Whether the features of frozen encoders are kept on disk.
    """
    inputs = [SlideInputs(slide, model.inputs, model.vocabulary, slide_id=i) for i, slide in enumerate(slides)]
    for one, spots in zip(inputs, measured or [None] * len(inputs), strict=True):
        one.measured = spots
    if cache or "image" in model.inputs.centre:  # a slide's mean is known once all of its features are
        use_frozen_features(model, inputs, device=device, cache=cache)
        model.ready(inputs)
    tables = [(np.empty((one.n_obs, len(genes)), np.float32), np.empty((one.n_obs, len(genes)), np.float32))
              for one in inputs]  # fmt: skip
    blocks = run_blocks(model, inputs, lambda batch: model.predict(batch, own=own), batch_size=batch_size,
                        device=device)  # fmt: skip
    with progress("Predicting", sum(one.n_obs for one in inputs)) as advance:
        for number, indices, prediction in blocks:
            mean, deviation = tables[number]
            mean[indices] = prediction.mean[:, genes].float().cpu().numpy()
            deviation[indices] = prediction.deviation[:, genes].float().cpu().numpy()
            advance(len(indices))
    return tables


def genes_written(
    model: Model, genes: Sequence[str] | None, *, from_image: bool = False
) -> tuple[list[str], NDArray[np.int64]]:
    """Return names, as they were asked for, and positions of genes in a model's vocabulary.

    Parameters
    ----------
    model
        A model that writes expression.
    genes
        Names, or Ensembl ids (with or without version; of an orthologue too) where the vocabulary has them; None takes
        all that it has learned.
    from_image
        Whether they will be predicted from H&E alone: then None takes those that training had beside H&E.

    Raises
    ------
    InputError
        The model does not know a gene, no training slide had measured it, or it is named twice.
    """
    learned = model.written_genes()
    if model.vocabulary is None or not learned.any():
        msg = f"this {model.family!r} model writes no expression; train it on slides with counts first."
        raise InputError(msg)
    names = [str(name) for name in model.vocabulary.names]
    if genes is None:
        paired = model.paired_genes()
        chosen = np.flatnonzero(paired if from_image and paired.any() else learned)
        return [names[i] for i in chosen], chosen
    if isinstance(genes, str):
        msg = f"genes={genes!r} is one name; give a list of names, genes=[{genes!r}]."
        raise InputError(msg)
    asked = [str(gene) for gene in genes]
    if not asked:
        msg = "genes is empty; name at least one."
        raise InputError(msg)
    place = model.vocabulary.find(asked)
    if absent := [gene for gene, i in zip(asked, place, strict=True) if i is None]:
        msg = f"the model does not know gene {absent[0]!r}. {nearest_genes(absent[0], names)}"
        raise InputError(msg)
    chosen = np.array(place, dtype=np.int64)
    _check_once(asked, chosen)
    if not learned[chosen].all():
        first = asked[int(np.argmin(learned[chosen]))]
        msg = (
            f"gene {first!r} is in the model's vocabulary, but no training slide had measured it, so it cannot be "
            "predicted; train on a slide with it, or leave it out."
        )
        raise InputError(msg)
    return asked, chosen


def _check_once(genes: Sequence[str], places: NDArray[np.int64]) -> None:
    """Refuse a gene that is named twice, be it in another case or by its Ensembl id."""
    seen: dict[int, str] = {}
    for gene, place in zip(genes, places.tolist(), strict=True):
        if (other := seen.get(place)) is not None:
            also = "" if other == gene else f" (as {other!r} too)"
            msg = f"genes names {gene!r} twice{also}; name each gene once."
            raise InputError(msg)
        seen[place] = gene


def nearest_genes(gene: str, names: Sequence[str]) -> str:
    """Return a sentence that names the genes spelled most like one that is not there."""
    spelled = {name.upper(): name for name in names}
    near = difflib.get_close_matches(gene.upper(), spelled, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(spelled[n]) for n in near)}?"
    return f"There are {len(names)} genes, {', '.join(map(repr, names[:5]))} among them."
