"""Spatial domains of a slide, or of several at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from stfm._errors import InputError, MissingKeyError, WrongTypeError
from stfm._keys import DOMAIN, EMBEDDING, NICHE, SPATIAL
from stfm._palette import category_colors
from stfm._provenance import record
from stfm._validate import check_choice, check_count, check_key, did_you_mean
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

__all__ = ["spatial_domains"]

Refine = Literal["majority"] | bool


def spatial_domains(
    adata: AnnData,
    n_domains: int,
    *,
    method: Literal["gmm", "consensus", "kmeans", "leiden"] = "gmm",
    refine: Refine = False,
    smooth_rings: int = 0,
    use_rep: str = EMBEDDING,
    covariance: Literal["tied", "full", "diag", "spherical"] = "tied",
    n_components: int | None = 30,
    n_init: int = 10,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    niche_key: str = NICHE,
    key_added: str = DOMAIN,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Find spatial domains by clustering an embedding.

    Spots of several libraries are clustered together, so that a domain has one name everywhere; neighbours never cross
    libraries.

    Parameters
    ----------
    adata
        Object with an embedding in ``obsm``, or a SpatialData whose table has one.
    n_domains
        Number of domains.
    method
        ``"gmm"`` (Gaussian mixture with one covariance), ``"consensus"`` (votes of many such mixtures, which moves
        least with the seed), ``"kmeans"``, or ``"leiden"`` with its resolution found by bisection.
    refine
        ``"majority"`` (or True) gives each spot the domain of most of its neighbours: those of the niche table where
        :func:`stfm.pp.build_niches` made one, else the first ring around the spot. It helps where domains are many
        spots wide and erases those that are one or two spots wide.
    smooth_rings
        Average the embedding over so many rings of neighbours before clustering, with the same caveat.
    use_rep
        Entry of ``obsm``: ``"X_stfm"``, one of its parts, ``"X_pca"`` …
    covariance
        Of the mixture: ``"tied"``, ``"full"``, ``"diag"``, ``"spherical"``.
    n_components
        Principal components of the embedding that are kept; None for all.
    n_init
        Random starts of ``"gmm"``, ``"consensus"`` and ``"kmeans"``.
    library_key
        Column of ``obs`` that names the library of a spot; found when there is only one candidate.
    spatial_key
        Entry of ``obsm`` with the coordinates; read only to refine or smooth.
    niche_key
        Name under which the niche table was written.
    key_added
        Column of ``obs`` that is written.
    rng
        Seed or generator.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    None, or with ``copy=True`` the new object. Written are
    ``obs[key_added]`` (categorical ``(n,)``: ``"0"``, ``"1"`` … in falling order of size),
    ``uns[key_added + "_colors"]`` (hex colours, one a domain) and ``uns[key_added]`` (how it was made).

    Raises
    ------
    MissingKeyError
        The embedding or the coordinates are not there.
    InputError
        An argument is out of range, the embedding is not finite, or ``uns[key_added]`` holds another result.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "st-align-tiny", epochs=1)
    >>> sf.tl.embed(adata, model)
    >>> sf.tl.spatial_domains(adata, n_domains=3)
    >>> adata.obs["spatial_domain"].nunique()
    3
    """
    if is_spatialdata(adata):
        return on_spatialdata(spatial_domains, locals(), images=False)
    import pandas as pd

    from stfm.inference.domains import cluster, majority
    from stfm.inference.rings import ring_means
    from stfm.slide.from_anndata import target

    check_key("key_added", key_added, taken=(spatial_key, library_key, niche_key))
    refinement = _refinement(refine)
    check_count("smooth_rings", smooth_rings, minimum=0)
    embedding = _embedding(adata, use_rep)
    _check_free(adata, key_added)
    graph = None
    if smooth_rings:
        rings = _rings(adata, smooth_rings, library_key, spatial_key)
        embedding = ring_means(embedding, sum(rings[1:], rings[0]), with_self=True)
    if refinement == "majority":
        graph = _niche_graph(adata, niche_key)
        if graph is None:
            graph = _rings(adata, 1, library_key, spatial_key)[0]
    labels = cluster(
        embedding, n_domains, method=method, covariance=covariance, n_components=n_components, n_init=n_init, rng=rng
    )
    if graph is not None:
        labels = majority(labels, graph)
    names = [str(i) for i in range(int(labels.max()) + 1)]
    column = pd.Categorical(np.array(names)[labels], categories=names).remove_unused_categories()
    params = {
        "n_domains": n_domains, "method": method, "refine": refinement, "smooth_rings": smooth_rings,
        "use_rep": use_rep, "covariance": covariance, "n_components": n_components, "n_init": n_init,
        "rng": rng if isinstance(rng, (int, np.integer)) else "generator" if rng is not None else None,
    }  # fmt: skip
    written = target(adata, copy=copy)
    written.obs[key_added] = column
    written.uns[f"{key_added}_colors"] = np.array(category_colors(len(column.categories)))
    written.uns[key_added] = {"params": record(params)}
    return written if copy else None


def _check_free(adata: AnnData, key: str) -> None:
    """Refuse a name under which ``uns`` keeps how something else was made."""
    there = adata.uns.get(key)
    params = there.get("params") if isinstance(there, Mapping) else None
    if there is not None and not (isinstance(params, Mapping) and "n_domains" in params):
        msg = f"key_added={key!r} is the name of another result (adata.uns[{key!r}]); give the domains their own."
        raise InputError(msg)


def _refinement(refine: Refine) -> str:
    if isinstance(refine, bool):
        return "majority" if refine else "none"
    return check_choice("refine", refine, ("majority", "none"))


def _embedding(adata: AnnData, use_rep: str) -> NDArray[np.float32]:
    from anndata import AnnData as Class

    if not isinstance(adata, Class):
        msg = f"adata must be AnnData, got {type(adata).__name__}."
        raise WrongTypeError(msg)
    if use_rep not in adata.obsm:
        advice = "Run sf.tl.embed(adata) first, or name another embedding with use_rep=."
        msg = f"adata.obsm has no {use_rep!r}. {did_you_mean(use_rep, map(str, adata.obsm))} {advice}"
        raise MissingKeyError(msg)
    values: NDArray[np.float32] = np.asarray(adata.obsm[use_rep])
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        msg = f"adata.obsm[{use_rep!r}] must be a finite table with one row a spot; embed again or drop the bad spots."
        raise InputError(msg)
    return values


def _rings(adata: AnnData, n_rings: int, library_key: str | None, spatial_key: str) -> list[csr_matrix]:
    from stfm.inference.rings import ring_graphs
    from stfm.slide.from_anndata import coordinates, libraries

    library = np.empty(adata.n_obs, np.int64)
    for i, one in enumerate(libraries(adata, library_key)):
        library[one.rows] = i
    return ring_graphs(coordinates(adata, spatial_key), n_rings, groups=library)


def _niche_graph(adata: AnnData, niche_key: str) -> csr_matrix | None:
    """Return the connectivities that :func:`stfm.pp.build_niches` wrote, where there are any."""
    key = adata.uns.get(niche_key, {}).get("connectivities_key")
    graph: csr_matrix | None = adata.obsp.get(key)
    return graph
