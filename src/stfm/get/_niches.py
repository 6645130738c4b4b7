"""Niches as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm._errors import MissingKeyError, WrongTypeError
from stfm._keys import NICHE
from stfm.slide.niches import NicheTable

if TYPE_CHECKING:
    from anndata import AnnData


def niche_table(adata: AnnData, *, key: str = NICHE) -> NicheTable:
    """Read the niches that :func:`stfm.pp.build_niches` wrote, also after spots were taken out.

    Parameters
    ----------
    adata
        Spots with niches.
    key
        What was ``key_added``.

    Returns
    -------
    Table with ``index``, int32 ``(n, k)``: positions of the neighbours, the nearest first, -1 where a spot has fewer;
    and ``distance``, float32 ``(n, k)``: their distances in ``uns[key]["params"]["unit"]``, inf where a spot has fewer.

    Raises
    ------
    MissingKeyError
        There are no niches of that name.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> sf.pp.build_niches(adata, n_neighbors=6)
    >>> sf.get.niche_table(adata).distance[0].round()
    array([100., 100., 100., 173., 173., 200.], dtype=float32)
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        msg = f"adata must be AnnData, got {type(adata).__name__}."
        raise WrongTypeError(msg)
    if key not in adata.uns or "connectivities_key" not in adata.uns[key]:
        msg = f"adata.uns has no niches named {key!r}; run stfm.pp.build_niches(adata, key_added={key!r}) first."
        raise MissingKeyError(msg)
    keys = [adata.uns[key][name] for name in ("connectivities_key", "distances_key")]
    for name in keys:
        if name not in adata.obsp:
            msg = f"adata.obsp has no {name!r}, which uns[{key!r}] names; run stfm.pp.build_niches(adata) again."
            raise MissingKeyError(msg)
    return NicheTable.from_csr(adata.obsp[keys[0]], adata.obsp[keys[1]])
