"""Niches: the exact nearest neighbours of every spot, and their mean expression (ST-Align, eqs. 1 and 2)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive
from stfm.slide import _niche_scipy
from stfm.slide._niche_mean import niche_mean
from stfm.slide._niche_table import NicheTable, check_coords, empty_table, trimmed, widened, with_self
from stfm.slide._niche_twins import knn_numpy, niche_mean_numpy
from stfm.slide._threads import n_threads, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from stfm.slide._niche_grid import Grid
    from stfm.slide._niche_kernels import Rule
    from stfm.slide._niche_tree import Tree

__all__ = ["NicheTable", "knn", "knn_numpy", "lattice_tolerance", "niche_mean", "niche_mean_numpy"]

TIES = ("index", "all")
_KERNELS = "stfm.slide._niche_kernels"
_SAMPLE = 128  # spots that are asked first, to see how distances tie
_LATTICE_SPOTS = 10  # fewer are never called a lattice
_LATTICE_SHARE = 0.9  # share of the spots of a lattice whose nearest neighbour lies at one pitch ...
_LATTICE_SPREAD = 0.025  # ... to this part of it: rounding to pixels moves Visium's neighbours by up to 1.4 %
_LATTICE_TIE = 0.05  # of the pitch: distances on a lattice that differ by less are one shell


def knn(
    coords: ArrayLike,
    n_neighbors: int | None = 3,
    *,
    radius: float | None = None,
    include_self: bool = False,
    groups: ArrayLike | None = None,
    ties: str = "index",
    tie_tolerance: float | None = None,
    n_jobs: int | None = None,
) -> NicheTable:
    """Find the exact nearest neighbours of every point (eq. 1), within its group.

    Points that fill their area evenly are searched through a uniform grid, others (clusters, 3-D) through a k-d tree,
    few points through scipy's as long as no compiled code is loaded; the result does not depend on which, nor on the
    number of threads.

    Parameters
    ----------
    coords
        Points, ``(n, 2)`` or ``(n, 3)``.
    n_neighbors
        Neighbours of a point, itself not counted; None for all within ``radius``.
    radius
        Largest distance of a neighbour (included), in the unit of ``coords``; points that are more isolated have fewer.
    include_self
        Put the point itself before its neighbours, at distance 0.
    groups
        A label a point, such as the library of a spot; neighbours never cross groups.
    ties
        Of neighbours that are equally far and do not all fit, keep those of lowest ``"index"``, or ``"all"`` of them.
    tie_tolerance
        Distances are equally far if they differ by at most this much from the nearest of them; 0 compares exactly.
        None: 5 % of the pitch where a group is a regular lattice (:func:`lattice_tolerance`), else 0. A lattice whose
        coordinates were rounded to pixels thus gives the niches of the lattice, not those of the rounding.
    n_jobs
        Threads; None for all.

    Returns
    -------
    Index and distance of the neighbours; rows are sorted by distance, then index.

    Raises
    ------
    InputError
        Coordinates that are not finite or of another shape; arguments out of range.
    """
    points = check_coords(coords)
    request = Request(n_neighbors, radius, ties, tie_tolerance)
    members = _members(groups, len(points))
    return find_niches(points, members, request, include_self=include_self, n_jobs=n_jobs)[0]


def find_niches(
    points: NDArray[np.float64],
    members: Sequence[NDArray[np.intp]] | None,
    request: Request,
    *,
    scales: Sequence[float] | None = None,
    include_self: bool = False,
    n_jobs: int | None = None,
) -> tuple[NicheTable, list[float]]:
    """Search checked points group by group.

    Parameters
    ----------
    points
        What :func:`check_coords` returned.
    members
        Ascending rows of each group, together all rows; None for a single group.
    request
        What makes a niche, lengths in the unit of the result.
    scales
        Units of the result per unit of the points, a group each (µm/px); None for 1. Distances are compared before
        they are scaled, so that whole pixels tie exactly.
    include_self, n_jobs
        As for :func:`knn`.

    Returns
    -------
    The table of all points, and for each group the largest difference at which two distances were taken as equal.
    """
    threads = n_threads(n_jobs)
    parts = [points] if members is None else [points[own] for own in members]
    factors = [1.0] * len(parts) if scales is None else list(scales)
    tables, tolerances = [], []
    for part, factor in zip(parts, factors, strict=True):
        table, tolerance = _search(part, request.scaled(1.0 / factor), threads)
        tables.append(table if factor == 1.0 else table.scaled(factor))
        tolerances.append(tolerance * factor)
    whole = tables[0] if members is None else _joined(tables, members, len(points), request)
    return (with_self(whole) if include_self else whole), tolerances


@dataclass(frozen=True)
class Request:
    """What makes a niche: the arguments of :func:`knn`, checked."""

    n_neighbors: int | None = 3
    radius: float | None = None
    ties: str = "index"
    tie_tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.n_neighbors is None and self.radius is None:
            msg = "n_neighbors=None keeps all neighbours within a radius; pass radius=."
            raise InputError(msg)
        if self.n_neighbors is not None:
            check_count("n_neighbors", self.n_neighbors)
        if self.radius is not None:
            check_positive("radius", self.radius)
        check_choice("ties", self.ties, TIES)
        if self.tie_tolerance is not None and not (np.isfinite(self.tie_tolerance) and self.tie_tolerance >= 0):
            msg = f"tie_tolerance must be a distance of at least 0, got {self.tie_tolerance}."
            raise InputError(msg)

    def scaled(self, factor: float) -> Request:
        """Return the request with its lengths in another unit."""
        if factor == 1.0:
            return self
        radius = None if self.radius is None else self.radius * factor
        tolerance = None if self.tie_tolerance is None else self.tie_tolerance * factor
        return Request(self.n_neighbors, radius, self.ties, tolerance)

    @property
    def ragged(self) -> bool:
        """Whether spots may have more neighbours than were asked for."""
        return self.n_neighbors is None or self.ties == "all"

    @property
    def limit2(self) -> float:
        """Largest squared distance: a neighbour at exactly the radius belongs, however its distance is rounded."""
        return np.inf if self.radius is None else self.radius**2 * (1 + 1e-12)

    def rule(self, capacity: int, tolerance: float) -> Rule:
        """Return what a kernel needs to know; without a number of neighbours more are asked for than it can hold."""
        from stfm.slide._niche_kernels import Rule

        if self.n_neighbors is None:
            return Rule(capacity + 1, self.limit2, 0.0, True)
        return Rule(self.n_neighbors, self.limit2, tolerance, self.ties == "all")


def _members(groups: ArrayLike | None, n: int) -> list[NDArray[np.intp]] | None:
    """Return the rows of each group, ascending; None where there is but one group."""
    if groups is None:
        return None
    labels = np.asarray(groups)
    if labels.shape != (n,):
        msg = f"groups must have one label a point, shape ({n},), got {labels.shape}."
        raise InputError(msg)
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) <= 1:
        return None
    return list(np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]))


def _search(coords: NDArray[np.float64], request: Request, threads: int) -> tuple[NicheTable, float]:
    """Search one group, few points without compiled code unless it is there already."""
    n = len(coords)
    if n == 0:
        return empty_table(n, request.n_neighbors or 0), 0.0
    if n < _niche_scipy.FEW and _KERNELS not in sys.modules:
        found = _search_scipy(coords, request, threads)
        if found is not None:
            return found
    return _search_compiled(coords, request, threads)


def _search_scipy(coords: NDArray[np.float64], request: Request, threads: int) -> tuple[NicheTable, float] | None:
    """Search one group through scipy's tree; None where too many points are tied for it."""
    k, tolerance = request.n_neighbors, request.tie_tolerance
    if tolerance is None and (k is None or len(coords) < _LATTICE_SPOTS):
        tolerance = 0.0
    return _niche_scipy.search(
        coords,
        k,
        request.limit2,
        request.ties == "all",
        lattice_tolerance if tolerance is None else float(tolerance),
        _sample(len(coords)),
        threads,
    )


def _search_compiled(coords: NDArray[np.float64], request: Request, threads: int) -> tuple[NicheTable, float]:
    """Search one group: a first look at some spots shows how distances tie, and so how many candidates to hold."""
    from stfm.slide._niche_grid import Grid
    from stfm.slide._niche_tree import Tree

    n, k = len(coords), request.n_neighbors or 0
    searcher = (Grid.build(coords, k, threads) if coords.shape[1] == 2 else None) or Tree.build(coords, threads)
    tolerance = request.tie_tolerance
    sample = _asked_first(searcher)
    if tolerance is None:
        tolerance = lattice_tolerance(_nearest(searcher, sample)) if k and n >= _LATTICE_SPOTS else 0.0
    capacity = k
    if request.ragged or tolerance > 0:
        capacity = _capacity(searcher, sample, request, tolerance)
    return _fill(searcher, request, tolerance, capacity, threads), tolerance


def _nearest(searcher: Grid | Tree, sample: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the distances from some spots to their nearest neighbours."""
    from stfm.slide._niche_kernels import Rule

    return _ask(searcher, sample, 1, Rule(1, np.inf, 0.0, False)).distance[:, 0]


def lattice_tolerance(nearest: NDArray[np.floating]) -> float:
    """Return the difference below which distances are equal: 5 % of the pitch of a lattice, 0 where there is none.

    A lattice is where at least 90 % of the spots have their nearest neighbour at the median distance to 2.5 %.

    Parameters
    ----------
    nearest
        Distances from spots to their nearest neighbours.

    Returns
    -------
    The tolerance, in the unit of the distances.
    """
    pitch = float(np.median(nearest))
    if not np.isfinite(pitch):
        return 0.0  # spots without any neighbour
    regular = np.abs(nearest - pitch) <= _LATTICE_SPREAD * pitch
    return _LATTICE_TIE * pitch if regular.mean() >= _LATTICE_SHARE else 0.0


def _capacity(searcher: Grid | Tree, sample: NDArray[np.int32], request: Request, tolerance: float) -> int:
    """Return how many candidates settle nearly all niches, judged by some of them."""
    n = len(searcher.ids)
    k = request.n_neighbors or 0
    trial = min(2 * k + 16, n)
    rule = request.rule(trial, tolerance)._replace(keep_all=True)
    degree = _ask(searcher, sample, trial, rule).degree
    return min(max(int(degree.max(initial=0)), k) + 1, n)


def _asked_first(searcher: Grid | Tree) -> NDArray[np.int32]:
    """Return the positions of the sample."""
    n = len(searcher.ids)
    asked = np.zeros(n, np.bool_)
    asked[_sample(n)] = True
    return np.flatnonzero(asked[searcher.ids]).astype(np.int32)


def _sample(n: int) -> NDArray[np.intp]:
    """Return spots that lie evenly over the tissue, as spots are mostly listed place by place."""
    return np.unique(np.linspace(0, n - 1, _SAMPLE).astype(np.intp))


def _ask(searcher: Grid | Tree, sample: NDArray[np.int32], capacity: int, rule: Rule) -> NicheTable:
    """Return the niches of a sample alone, given by position."""
    n = len(searcher.ids)
    blocks = searcher.blocks(sample)
    answered = searcher.positions(blocks)  # those of the sample, and others that are found together with them
    rows = np.empty(n, np.int32)
    rows[answered] = np.arange(len(answered), dtype=np.int32)
    table = empty_table(len(answered), capacity)
    searcher.query(blocks, capacity, rule, rows, table.index, table.distance, np.zeros(n, np.bool_))
    return NicheTable(table.index[rows[sample]], table.distance[rows[sample]])


def _fill(searcher: Grid | Tree, request: Request, tolerance: float, capacity: int, threads: int) -> NicheTable:
    """Return the whole table; spots whose candidates did not show where a tie ends are asked again for more."""
    n, k = len(searcher.ids), request.n_neighbors
    ragged = request.ragged
    table = empty_table(n, capacity if ragged else k or 0, blank=ragged or request.radius is not None or n <= (k or 0))
    blocks: NDArray[np.int32] = np.arange(searcher.n_blocks, dtype=np.int32)
    while True:
        short = np.zeros(n, np.bool_)
        rule = request.rule(capacity, tolerance)

        def look(lo: int, hi: int, todo=blocks, held=capacity, rule=rule, table=table, short=short) -> None:  # type: ignore[no-untyped-def]
            searcher.query(todo[lo:hi], held, rule, searcher.ids, table.index, table.distance, short)

        run(look, len(blocks), threads, parts=8, inline=searcher.few)
        again = np.flatnonzero(short).astype(np.int32)
        if len(again) == 0:
            break
        capacity = min(2 * capacity, n)
        blocks = searcher.blocks(again)
        if ragged:
            table = widened(table, capacity)
    return trimmed(table) if ragged else table


def _joined(tables: Sequence[NicheTable], members: Sequence[NDArray[np.intp]], n: int, request: Request) -> NicheTable:
    """Return one table of all points from those of the groups."""
    asked = 0 if request.ragged else request.n_neighbors or 0
    whole = empty_table(n, max([asked, *(table.k for table in tables)]))
    for table, own in zip(tables, members, strict=True):
        whole.index[own, : table.k] = np.where(table.index >= 0, own[table.index], -1)
        whole.distance[own, : table.k] = table.distance
    return whole
