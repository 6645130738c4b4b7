"""Expression that a model writes by itself, for ``tl.predict_expression`` and ``tl.impute``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stfm._errors import InputError, MissingKeyError
from stfm._provenance import record
from stfm.inference.contexts import warn_coarse
from stfm.inference.predict import genes_written, predict_slides
from stfm.slide.read import as_slides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stfm.models.base import Model
    from stfm.slide.slide import Slide
    from stfm.tl._seen import Exposure

#: what is said beside a prediction
SCALE = "log1p(1e4 * counts / sum of counts)"


class Written(NamedTuple):
    """Genes, and of every spot in the order of the object expected expression and its deviation.

    ``extrapolated`` are those of the genes that H&E tells of through their embedding alone.
    """

    genes: list[str]
    extrapolated: list[str]
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    slides: list[Slide]


def write_expression(
    adata: AnnData,
    model: Model,
    genes: Sequence[str] | None,
    *,
    measured: NDArray[np.bool_] | None,
    use_counts: bool,
    own: bool,
    batch_size: int,
    device: str,
    cache: bool,
    stacklevel: int,
    **reading: Any,
) -> Written:
    """Let a model write expression for every spot of an object.

    Parameters
    ----------
    adata
        The object.
    model
        A model that writes expression.
    genes
        Names; None takes all that the model has learned.
    measured
        Spots whose counts may be used; None: all.
    use_counts
        Whether counts are used at all.
    own
        Whether a spot's own counts may be used for it.
    batch_size, device, cache
        As of :func:`~stfm.inference.predict.predict_slides`.
    stacklevel
        Of warnings, where the caller of this function is 2.
    reading
        Arguments of :func:`~stfm.slide.read.as_slides`.
    """
    names, chosen = genes_written(model, genes, from_image=not use_counts)
    modalities = ("image", "gene") if use_counts else ("image",)
    slides = as_slides(adata, modalities=modalities, **reading)
    warn_coarse(slides, model.inputs, stacklevel=stacklevel + 1)
    per_slide = None if measured is None else [measured[slide.rows] for slide in slides]
    tables = predict_slides(
        model, slides, chosen, measured=per_slide, own=own, batch_size=batch_size, device=device, cache=cache
    )
    mean = np.full((adata.n_obs, len(names)), np.nan, np.float32)
    deviation = mean.copy()
    for slide, (expected, spread) in zip(slides, tables, strict=True):
        mean[slide.rows], deviation[slide.rows] = expected, spread
    far = [] if use_counts else [names[i] for i in np.flatnonzero(~model.paired_genes()[chosen])]
    return Written(names, far, mean, deviation, slides)


def measured_spots(adata: AnnData, key: str | None) -> NDArray[np.bool_] | None:
    """Return the spots that a column of ``obs`` marks as measured."""
    if key is None:
        return None
    if key not in adata.obs:
        msg = (
            f"adata.obs has no column {key!r}, which measured_key= names; it marks the spots whose counts may be used."
        )
        raise MissingKeyError(msg)
    column = adata.obs[key]
    if column.dtype != bool:
        msg = (
            f"obs[{key!r}] must hold True and False, got {column.dtype}; compare it with what marks a measured spot, "
            f"for example adata.obs[{key!r}] = adata.obs[{key!r}] == {_first(column)!r}."
        )
        raise InputError(msg)
    return np.asarray(column, dtype=bool)


def _first(column: Any) -> Any:
    """Return the first value of a column that is there, for an example."""
    there = column.dropna()
    return "yes" if there.empty else there.tolist()[0]


def describe_written(
    model: Model, source: str, written: Written, seen: Exposure | None, **extra: Any
) -> dict[str, Any]:
    """Say how expression was written."""
    described = {
        "scale": SCALE, "by": model.family, "source": source, "weights_sha256": model.weights_sha256(),
        "n_genes": len(written.genes), **extra,
    }  # fmt: skip
    return record(described if seen is None else {**described, **seen.to_dict()})
