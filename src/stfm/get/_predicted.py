"""Predicted expression as an AnnData of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import MissingKeyError, WrongTypeError
from stfm._keys import PREDICTED

if TYPE_CHECKING:
    from anndata import AnnData


def predicted(adata: AnnData, *, key: str = PREDICTED) -> AnnData:
    """Return what :func:`stfm.tl.predict_expression` wrote as an AnnData that scanpy plots.

    Parameters
    ----------
    adata
        Spots with predicted expression.
    key
        What was ``key_added``.

    Returns
    -------
    AnnData ``(n, g)``: ``X`` float32 in ``log1p(1e4 c / sum c)``, ``obs``, ``obsm`` (without the prediction itself) and
    ``uns`` (the image among it) of ``adata``; ``var`` as in ``adata`` for genes that it measured. ``uns[key]`` says of
    every library whether it, or its patient, was seen in training (``seen_in_training``,
    ``patient_seen_in_training``).

    Raises
    ------
    MissingKeyError
        Nothing was predicted under that name.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, n_patients=2, mpp=4.0)
    >>> known = adata[adata.obs["patient"] == "patient_1"].copy()
    >>> new = adata[adata.obs["patient"] == "patient_2"].copy()
    >>> sf.tl.predict_expression(new, reference=known, genes=["ERBB2", "MUC1"], rings=0, tile_px=64)
    >>> sf.get.predicted(new).var_names.tolist()
    ['ERBB2', 'MUC1']
    """
    from anndata import AnnData as Class

    if not isinstance(adata, Class):
        msg = f"adata must be AnnData, got {type(adata).__name__}."
        raise WrongTypeError(msg)
    if key not in adata.obsm:
        msg = f"adata.obsm has no {key!r}; run stfm.tl.predict_expression(adata, ..., key_added={key!r}) first."
        raise MissingKeyError(msg)
    table = adata.obsm[key]
    result = Class(
        X=np.asarray(table, dtype=np.float32),
        obs=adata.obs.copy(),
        var=adata.var.reindex(table.columns),
        obsm={name: value for name, value in adata.obsm.items() if name != key},
        uns=dict(adata.uns),
    )
    result.uns["log1p"] = {"base": None}  # scanpy: X is on a natural log scale
    return result
