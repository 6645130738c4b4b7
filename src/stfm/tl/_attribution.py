"""What moved a prediction or an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from stfm._errors import InputError, MissingKeyError
from stfm._keys import ATTRIBUTION, SPATIAL, part_key
from stfm._optional import require
from stfm._provenance import record
from stfm._validate import check_choice, check_count, check_key, did_you_mean
from stfm.inference.attribution import BASELINES, attribute_spots, target_of
from stfm.inference.features import use_frozen_features
from stfm.inference.predict import genes_written
from stfm.models.inputs import SlideInputs
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata
from stfm.slide.read import as_slides
from stfm.tl._models import resolve_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray

    from stfm.inference.attribution import Attribution
    from stfm.models.base import Model

__all__ = ["attribute"]

METHODS = ("integrated_gradients",)


def attribute(
    adata: AnnData,
    model: Model | str | Path,
    *,
    target: str | ArrayLike,
    spots: str | Sequence[str],
    method: Literal["integrated_gradients"] = "integrated_gradients",
    use_counts: bool = True,
    own: bool = False,
    baseline: Literal["mean", "zero"] = "mean",
    n_steps: int = 50,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    device: str = "auto",
    cache: bool = True,
    key_added: str = ATTRIBUTION,
    copy: bool = False,
) -> AnnData | None:
    """Say which tiles and genes around a spot moved its predicted expression, or its embedding.

    Integrated gradients: the gradient of the output, summed on the way from a baseline to what was measured. The
    attributions of all tiles and counts that were read add up to the output less that of the baseline.

    Parameters
    ----------
    adata
        Object with H&E, counts or both.
    model
        A trained model, or the folder that it was saved to.
    target
        A gene that the model predicts (of a model that writes expression, ``storm``); or a direction of its joint
        embedding, ``(d,)``, for example the difference of two domains' means of ``obsm["X_stfm"]``.
    spots
        Name of a spot (``obs_names``), or several.
    method
        ``"integrated_gradients"``.
    use_counts
        Whether counts are looked at; off explains the prediction from H&E alone.
    own
        Whether a spot's own counts may be used for its predicted expression (an embedding always reads them).
    baseline
        What a spot is compared with. ``"mean"``: a window of average spots of the slide. ``"zero"``: white tiles
        (features of 0, where the image encoder is frozen) and no counts.
    n_steps
        Steps from the baseline to the spot; the error of the sum falls as 1 / steps.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    layer
        Layer with raw counts; None takes ``X``.
    image
        H&E where it is neither in ``uns["spatial"]`` nor recorded; or a mapping from library to it.
    mpp
        µm per px of the full-resolution image; or a mapping from library to it.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    cache
        Whether the features of frozen encoders are kept on disk.
    key_added
        Name of the result.
    copy
        Whether to return a new object instead of writing to ``adata``.

    Returns
    -------
    None, or with ``copy=True`` the new object. Written are

    obs[key_added]
        What each spot, by its tile and its counts, added to the output of the asked spots (their sum), float64; nan for
        spots that were not looked at.
    obs[key_added + "_image"], obs[key_added + "_gene"]
        The same of tiles and of counts alone; what was not read is not written.
    uns[key_added]
        ``spots``: DataFrame with ``output``, ``baseline`` and ``attributed``, the sum, of each asked spot; ``genes``
        (where counts were read): DataFrame, genes x asked spots, summed over the spots of the window; method, model,
        target.

    Raises
    ------
    InputError
        The model does not write that gene, or the direction has another length than the embedding.
    MissingKeyError
        No such spot.
    MissingDependencyError
        captum is not installed.

    References
    ----------
    Sundararajan, Taly & Yan, Axiomatic Attribution for Deep Networks, ICML 2017.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "storm-tiny", epochs=1, stage="mask")
    >>> sf.tl.attribute(adata, model, target="ERBB2", spots=adata.obs_names[0], n_steps=5)
    >>> list(adata.uns["attribution"]["spots"].columns)
    ['output', 'baseline', 'attributed']
    """
    if is_spatialdata(adata):
        return on_spatialdata(attribute, locals())
    from stfm.slide.from_anndata import check_table
    from stfm.slide.from_anndata import target as written_to

    check_table(adata)
    check_key("key_added", key_added, taken=(spatial_key, library_key))
    _check_method(method, baseline, n_steps)
    trained, source = resolve_model(model)
    asked = _asked(adata, spots)
    goal, said = _goal(trained, target)
    explained = target_of(trained, goal, own=own)
    slides = as_slides(
        adata, modalities=("image", "gene") if use_counts else ("image",), library_key=library_key,
        spatial_key=spatial_key, layer=layer, image=image, mpp=mpp,
    )  # fmt: skip
    found: dict[int, tuple[NDArray[np.int64], Attribution]] = {}
    for number, slide in enumerate(slides):
        local = np.flatnonzero(np.isin(slide.rows, asked))
        if len(local):
            inputs = SlideInputs(slide, trained.inputs, trained.vocabulary, slide_id=number)
            if inputs.has_image:
                use_frozen_features(trained, [inputs], device=device, cache=cache)
            parts = attribute_spots(
                trained, inputs, local, explained, n_steps=n_steps, baseline=baseline, device=device
            )
            found |= {int(slide.rows[i]): (slide.rows, part) for i, part in zip(local, parts, strict=True)}
    tables = _tables(adata, trained, [found[i] for i in asked], adata.obs_names[asked])
    how = {
        "method": method, "target": said, "model": trained.family, "source": source,
        "weights_sha256": trained.weights_sha256(), "use_counts": use_counts, "own": own, "baseline": baseline,
        "n_steps": n_steps,
    }  # fmt: skip
    result = written_to(adata, copy=copy)
    _write(result, key_added, tables)
    result.uns[key_added] = {**record(how), **tables.frames}
    return result if copy else None


def _check_method(method: str, baseline: str, n_steps: int) -> None:
    check_choice("method", method, METHODS)
    check_choice("baseline", baseline, BASELINES)
    check_count("n_steps", n_steps, minimum=2)
    require("captum", extra="attribution")


class _Tables(NamedTuple):
    """Values of every spot by part (``""``: all), and the DataFrames of ``uns``."""

    spots: dict[str, NDArray[np.float64]]
    frames: dict[str, pd.DataFrame]


def _write(adata: AnnData, key: str, tables: _Tables) -> None:
    """Write the columns of ``obs``; parts of an earlier run that are not there now go."""
    for part in ("image", "gene"):
        if part not in tables.spots and part_key(key, part) in adata.obs:
            del adata.obs[part_key(key, part)]
    for name, values in tables.spots.items():
        adata.obs[part_key(key, name) if name else key] = values


def _asked(adata: AnnData, spots: str | Sequence[str]) -> list[int]:
    """Return the rows of the asked spots."""
    names = [spots] if isinstance(spots, str) else [str(name) for name in spots]
    if not names:
        msg = "spots is empty; name at least one of adata.obs_names."
        raise InputError(msg)
    rows = adata.obs_names.get_indexer(names)
    if (rows < 0).any():
        absent = names[int(np.argmax(rows < 0))]
        msg = f"adata.obs_names has no {absent!r}. {did_you_mean(absent, list(map(str, adata.obs_names)))}"
        raise MissingKeyError(msg)
    return [int(row) for row in dict.fromkeys(rows)]


def _goal(model: Model, target: str | ArrayLike) -> tuple[int | NDArray[np.float64], str]:
    """Return the target as the engine takes it, and in words."""
    if isinstance(target, str):
        _, chosen = genes_written(model, [target])
        return int(chosen[0]), target
    direction = np.asarray(target, dtype=np.float64)
    if direction.ndim != 1 or not np.isfinite(direction).all() or not direction.any():
        msg = (
            "target must be a gene, or a direction of the embedding: one finite number a dimension, not all 0; "
            f"got an array of shape {direction.shape}."
        )
        raise InputError(msg)
    return direction, "direction of the embedding"


def _tables(
    adata: AnnData, model: Model, found: Sequence[tuple[NDArray[np.int64], Attribution]], names: Sequence[str]
) -> _Tables:
    """Sum the attributions of all asked spots on the spots of the object, and of each one by gene."""
    import pandas as pd

    spots: dict[str, NDArray[np.float64]] = {}
    for rows, one in found:
        at = rows[one.rows]
        gene = None if one.gene is None else one.gene.sum(axis=1)
        for name, values in (("image", one.image), ("gene", gene)):
            if values is not None:
                for key in ("", name):
                    table = spots.setdefault(key, np.full(adata.n_obs, np.nan))
                    table[at] = np.nan_to_num(table[at]) + values
    sums = pd.DataFrame(
        {"output": [one.output for _, one in found], "baseline": [one.baseline for _, one in found],
         "attributed": [one.total for _, one in found]}, index=pd.Index(names, name="spot"),
    )  # fmt: skip
    frames = {"spots": sums}
    columns = {name: one.gene.sum(axis=0) for name, (_, one) in zip(names, found, strict=True) if one.gene is not None}
    if columns and model.vocabulary is not None:
        frames["genes"] = pd.DataFrame(columns, index=pd.Index(list(map(str, model.vocabulary.names)), name="gene"))
    return _Tables(spots, frames)
