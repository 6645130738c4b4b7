"""The embedding as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import MissingKeyError, WrongTypeError
from stfm._keys import EMBEDDING, PARTS, part_key
from stfm._validate import check_choice

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def embedding(adata: AnnData, *, part: str = "joint", key: str = EMBEDDING) -> pd.DataFrame:
    """Read the embedding that :func:`stfm.tl.embed` wrote.

    Parameters
    ----------
    adata
        Spots with an embedding.
    part
        ``"joint"``, ``"image"``, ``"gene"`` or ``"niche"``.
    key
        What was ``key_added``.

    Returns
    -------
    DataFrame float32 ``(n, d)``: a row a spot, columns ``joint_0``, ``joint_1`` …

    Raises
    ------
    MissingKeyError
        There is no such embedding, or it has no such part (its modality was absent).

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "st-align-tiny", epochs=1)
    >>> sf.tl.embed(adata, model)
    >>> sf.get.embedding(adata, part="gene").columns[0]
    'gene_0'
    """
    import pandas as pd
    from anndata import AnnData as Class

    if not isinstance(adata, Class):
        msg = f"adata must be AnnData, got {type(adata).__name__}."
        raise WrongTypeError(msg)
    check_choice("part", part, ("joint", *PARTS))
    slot = key if part == "joint" else part_key(key, part)
    if slot not in adata.obsm:
        there = [p for p in PARTS if part_key(key, p) in adata.obsm]
        if key in adata.obsm:
            msg = f"the embedding {key!r} has no {part} part (it has: {', '.join(there) or 'none'})."
        else:
            msg = f"adata.obsm has no {key!r}; run stfm.tl.embed(adata, key_added={key!r}) first."
        raise MissingKeyError(msg)
    values = np.asarray(adata.obsm[slot])
    return pd.DataFrame(values, index=adata.obs_names, columns=[f"{part}_{i}" for i in range(values.shape[1])])
