"""Neighbours of every spot, written into ``obsp``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from stfm import _provenance
from stfm._errors import StfmWarning
from stfm._keys import NICHE, PATIENT, SPATIAL, niche_keys
from stfm._logging import get_logger
from stfm._validate import check_key
from stfm.slide.from_anndata import Library, check_spread, coordinates, libraries, library_column, scale_of, target
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata
from stfm.slide.niches import Request, find_niches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from stfm.slide.niches import NicheTable

_logger = get_logger(__name__)
_SCALE_SPOTS = 1000  # spots around the middle that show the lattice of a library
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill the unit interval evenly
_OVERLAP = 0.01  # more spots than that on top of another are no rounding but sections laid over each other


def build_niches(
    adata: AnnData,
    n_neighbors: int | None = 3,
    *,
    radius: float | None = None,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    include_self: bool = False,
    ties: str = "index",
    tie_tolerance: float | None = None,
    key_added: str = NICHE,
    n_jobs: int | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Find the nearest spots of every spot, within its library: its niche (ST-Align, eq. 1).

    The search is exact. Distances are in µm where the µm/px of every library is known, else in px; ``params["unit"]``
    tells which. The third coordinate of 3-D data is taken to be in the unit of the other two.

    On a lattice many spots are equally far: Visium's six first neighbours all lie at 100 µm, so that three nearest
    spots are a choice among six. ``ties`` decides it, and not the rounding of coordinates to whole pixels: where a
    library is a regular lattice, distances that differ by less than 5 % of the pitch are equal.

    Parameters
    ----------
    adata
        Spots with coordinates in ``obsm[spatial_key]``. A view is made an object of its own, with a warning. Or a
        SpatialData with one table of spots, which is then written to.
    n_neighbors
        Spots of a niche; None for all within ``radius``.
    radius
        Largest distance of a neighbour (included), in µm where µm/px is known, else px. Spots more isolated than that
        have smaller niches, or empty ones.
    library_key
        Column of ``obs`` that names the library of a spot; found when there is only one candidate. Niches never cross
        libraries.
    spatial_key
        Entry of ``obsm`` with the coordinates, in 2-D or 3-D.
    include_self
        Count the spot itself as the first of its niche, beside its ``n_neighbors`` neighbours.
    ties
        Of spots that are equally far and do not all fit, keep those that come first in ``adata`` (``"index"``) or
        ``"all"``.
    tie_tolerance
        Distances that differ by at most this much are equal, in the unit of ``radius``; 0 compares exactly. None: 5 %
        of the pitch on a lattice, 0 elsewhere.
    key_added
        Name of the entry in ``uns`` and start of the names in ``obsp``.
    n_jobs
        Threads; None for all.
    copy
        Return a copy instead of writing into ``adata``.

    Returns
    -------
    None, or the copy. Written are:

    ``obsp[f"{key_added}_connectivities"]``
        float32 CSR ``(n, n)``: 1 for the spots of a niche.
    ``obsp[f"{key_added}_distances"]``
        float32 CSR ``(n, n)``: their distances, the nearest first in every row; a stored 0 for spots at one place.
    ``uns[key_added]``
        ``connectivities_key``, ``distances_key`` and ``params``, so that scanpy (``neighbors_key="niche"``) and squidpy
        (``connectivity_key="niche_connectivities"``) use the niches as they are.

    Raises
    ------
    MissingKeyError
        There is no ``obsm[spatial_key]`` or no column ``library_key``.
    InputError
        There are no spots, coordinates are nan or all at one place, or an argument is out of range.

    Warns
    -----
    StfmWarning
        A library has no more than ``n_neighbors`` spots, or spots of several patients; no column names the library and
        spots lie on top of each other, as those of several sections do; ``radius`` leaves every spot alone; ``adata``
        is a view.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy()
    >>> sf.pp.build_niches(adata, n_neighbors=6)
    >>> sf.get.niche_table(adata).index.shape[1]
    6

    See Also
    --------
    stfm.get.niche_table : the niches as arrays.
    """
    if is_spatialdata(adata):
        return on_spatialdata(build_niches, locals(), images=False)
    check_key("key_added", key_added, taken=(spatial_key, library_key))
    request = Request(n_neighbors, radius, ties, tie_tolerance)
    coords = coordinates(adata, spatial_key)
    found = libraries(adata, library_key)
    check_spread(coords, found)
    mpp = _scales(adata, coords, found)
    table, tolerances = find_niches(
        coords,
        None if len(found) == 1 else [library.rows for library in found],
        request,
        scales=mpp,
        include_self=include_self,
        n_jobs=n_jobs,
    )
    params = {
        "method": "stfm",  # scanpy asks for a method and a metric
        "metric": "euclidean",
        "n_neighbors": n_neighbors,
        "radius": radius,
        "include_self": include_self,
        "ties": ties,
        "spatial_key": spatial_key,
        "library_key": library_key,
        "unit": "px" if mpp is None else "um",
        "libraries": [library.name for library in found],  # in the order of the next two
        "mpp": mpp,
        "tie_tolerance": tolerances,
    }
    _tell_patients(adata, found)
    if library_column(adata, library_key) is None:
        _tell_overlap(table, include_self=include_self)
    if n_neighbors is not None:
        _tell_small(found, n_neighbors)
    if radius is not None:
        _tell_isolated(table, radius, str(params["unit"]), include_self=include_self)
    return _write(adata, table, params, key_added, copy=copy)


def _scales(adata: AnnData, coords: NDArray[np.float64], found: list[Library]) -> list[float] | None:
    """Return µm/px of the libraries, or None where it is unknown for any of them."""
    scales = []
    for library in found:
        scale = scale_of(adata, _middle(library, coords), coords)
        if scale is None:
            return None
        scales.append(scale.mpp)
    return scales


def _middle(library: Library, coords: NDArray[np.float64]) -> Library:
    """Return a library of millions of spots with those around its middle, which show its lattice as well."""
    n = len(library.rows)
    if n <= 2 * _SCALE_SPOTS:
        return library
    xy = coords[:, :2] if n == len(coords) else coords[library.rows, :2]
    some = xy[(np.arange(20_000) * _GOLDEN % 1.0 * n).astype(np.intp)]  # even steps would fall into a few columns
    center = np.median(some, axis=0)
    reach = np.quantile(np.abs(some - center).max(axis=1), _SCALE_SPOTS / n)
    near = np.flatnonzero((xy[:, 0] >= center[0] - reach) & (xy[:, 0] <= center[0] + reach))
    near = near[np.abs(xy[near, 1] - center[1]) <= reach]
    return Library(library.name, library.rows[near])


def _tell_patients(adata: AnnData, found: list[Library]) -> None:
    """Warn of libraries that hold spots of several patients, which are no neighbours."""
    if PATIENT not in adata.obs:
        return
    patients = adata.obs[PATIENT]
    several = [(library, patients.iloc[library.rows].nunique()) for library in found]
    mixed = [f"{library.name!r} ({n} patients)" for library, n in several if n > 1]
    if mixed:
        warnings.warn(
            f"Spots of several patients are taken for one library, and for neighbours: {', '.join(mixed[:3])}. "
            "Name the column of obs that tells their libraries apart with library_key=.",
            StfmWarning,
            stacklevel=3,
        )


def _tell_overlap(table: NicheTable, *, include_self: bool) -> None:
    """Warn of spots on top of each other where no column says that they are of one section."""
    nearest = table.distance[:, int(include_self) :][:, :1]
    n = int((nearest == 0).sum())
    if n > _OVERLAP * table.n_obs:
        warnings.warn(
            f"{n} of {table.n_obs} spots lie exactly on another one, and no column of obs names their libraries. If "
            "these are several sections, they are taken for one: name the column with library_key=.",
            StfmWarning,
            stacklevel=3,
        )


def _tell_small(found: list[Library], n_neighbors: int) -> None:
    """Warn of libraries that are too small."""
    small = [library for library in found if len(library.rows) <= n_neighbors]
    if small:
        names = ", ".join(f"{library.name!r} ({len(library.rows)} spots)" for library in small[:3])
        warnings.warn(
            f"{len(small)} of {len(found)} libraries have no more than n_neighbors={n_neighbors} spots, so that niches "
            f"there hold all the others: {names}.",
            StfmWarning,
            stacklevel=3,
        )


def _tell_isolated(table: NicheTable, radius: float, unit: str, *, include_self: bool) -> None:
    """Warn where a radius leaves every spot alone, log where it leaves some alone."""
    alone = int((table.degree <= int(include_self)).sum())
    if alone == table.n_obs > 1:
        warnings.warn(
            f"No spot has a neighbour within radius={radius:g} {unit.replace('um', 'µm')}: every niche is empty. "
            "Give a radius beyond the distance between spots.",
            StfmWarning,
            stacklevel=3,
        )
    elif alone:
        _logger.info("%d spots have no neighbour within the radius; their niche is empty.", alone)


def _write(
    adata: AnnData, table: NicheTable, params: Mapping[str, object], key_added: str, *, copy: bool
) -> AnnData | None:
    """Write the slots."""
    connectivities, distances = table.to_csr(copy=False)
    connectivities_key, distances_key = niche_keys(key_added)
    record = _provenance.record(params)
    written = target(adata, copy=copy)
    written.obsp[connectivities_key] = connectivities
    written.obsp[distances_key] = distances
    written.uns[key_added] = {
        "connectivities_key": connectivities_key,
        "distances_key": distances_key,
        "params": record,
    }
    return written if copy else None
