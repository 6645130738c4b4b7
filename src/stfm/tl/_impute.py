"""Expression of a measured slide, denoised, and of genes that it did not measure."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import InputError, StfmWarning
from stfm._keys import IMPUTED, SPATIAL, deviation_key
from stfm._validate import check_key
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata
from stfm.slide.genes import Panel
from stfm.tl._models import resolve_model
from stfm.tl._written import describe_written, measured_spots, write_expression

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData

    from stfm.models.base import Model

__all__ = ["impute"]


def impute(
    adata: AnnData,
    model: Model | str | Path,
    *,
    genes: Sequence[str] | None = None,
    measured_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    cache: bool = True,
    key_added: str = IMPUTED,
    copy: bool = False,
) -> AnnData | None:
    """Denoise the expression of a measured slide, and fill in genes that it did not measure.

    The model looks at the counts of a spot and of the spots around it, and at H&E where there is any, and writes the
    expression that it expects there.

    Parameters
    ----------
    adata
        Object with raw counts.
    model
        A trained model that writes expression (``storm``), the folder that it was saved to, or the name of its weights
        (``"default"``).
    genes
        Genes to write to ``obsm``, be they measured here or not; None writes the panel of ``var``, to ``layers``.
    measured_key
        Column of ``obs``, True for the spots whose counts may be used; by default all.
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
    batch_size
        Spots at once.
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

    layers[key_added]
        Without ``genes``: ``log1p(1e4 c / sum c)`` on the panel of ``var``, float32 ``(n, n_vars)``; nan for genes that
        the model has not learned.
    obsm[key_added], obsm[key_added + "_sd"]
        With ``genes``: the same of these genes, and the deviation expected of a measured value, DataFrames ``(n, g)``.
    uns[key_added]
        Scale, model, what was used.

    Raises
    ------
    InputError
        The model writes no expression or none of these genes, or there are no counts.

    Warns
    -----
    StfmWarning
        H&E of a library is so coarse that the model's tile of a spot has fewer than 16 px of it; the model does not
        know all genes of the panel.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "storm-tiny", epochs=1, stage="mask")
    >>> sf.tl.impute(adata, model)
    >>> adata.layers["imputed"].shape == adata.shape
    True
    """
    if is_spatialdata(adata):
        return on_spatialdata(impute, locals())
    from stfm.slide.from_anndata import check_table, target

    check_table(adata)
    check_key("key_added", key_added, taken=(spatial_key, library_key, measured_key))
    trained, source = resolve_model(model)
    known = _known_columns(adata, trained) if genes is None else {}
    asked = list(dict.fromkeys(known.values())) if genes is None else genes
    measured = measured_spots(adata, measured_key)
    written = write_expression(
        adata, trained, asked, measured=measured, use_counts=True, own=True, batch_size=batch_size, device=device,
        cache=cache, stacklevel=3, library_key=library_key, spatial_key=spatial_key, layer=layer, image=image, mpp=mpp,
    )  # fmt: skip
    if any(slide.counts is None for slide in written.slides):
        msg = "adata has no counts to impute from; of H&E alone use sf.tl.predict_expression(adata, model=model)."
        raise InputError(msg)
    result = target(adata, copy=copy)
    if genes is None:
        table = np.full(adata.shape, np.nan, np.float32)
        place = {name: i for i, name in enumerate(written.genes)}
        table[:, list(known)] = written.mean[:, [place[name] for name in known.values()]]
        result.layers[key_added] = table
    else:
        import pandas as pd

        for name, values in ((key_added, written.mean), (deviation_key(key_added), written.deviation)):
            result.obsm[name] = pd.DataFrame(values, index=result.obs_names, columns=written.genes)
    used = adata.n_obs if measured is None else int(measured.sum())
    result.uns[key_added] = describe_written(trained, source, written, None, n_measured=used)
    return result if copy else None


def _known_columns(adata: AnnData, model: Model) -> dict[int, str]:
    """Return the columns of genes that the model writes, and how it names them; tell how many it does not."""
    learned, vocabulary, panel = model.written_genes(), model.vocabulary, Panel.from_var(adata.var)
    known: dict[int, str] = {}
    if vocabulary is not None:
        named = [names for names in (panel.ids, panel.symbols, panel.names) if names is not None]
        for column, places in enumerate(zip(*(vocabulary.find(map(str, names)) for names in named), strict=True)):
            place = next((place for place in places if place is not None and learned[place]), None)
            if place is not None:
                known[column] = str(vocabulary.names[place])
    if not known:
        msg = f"the model writes none of the {adata.n_vars} genes of adata.var_names; train it on slides with them."
        raise InputError(msg)
    if len(known) < adata.n_vars:
        msg = f"{adata.n_vars - len(known)} of {adata.n_vars} genes are not known to the model; they are nan."
        warnings.warn(msg, StfmWarning, stacklevel=3)
    return known
