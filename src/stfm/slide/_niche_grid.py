"""Exact neighbours in the plane through a uniform grid: for points that fill their area evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stfm.slide._niche_kernels import Rule, expect, insert, njit, reach, write_row
from stfm.slide._threads import edges, run

SLACK = 1e-6  # of the side of a cell: a point may lie a rounding error outside the cell it was counted in
_FAR = 8  # points to each side that may lie far from all others
_AHEAD = 6  # points: rows of the table are fetched before they are written
_CROWDED = 1.5  # times the points meant for a cell: beyond this a grid is the wrong tool


@njit
def cell_of(v: float, low: float, inverse: float, n: int) -> int:
    """Cell number of a coordinate along one axis."""
    return int(min(max((v - low) * inverse, 0.0), n - 1.0))


@njit
def count_cells(
    coords: NDArray[np.float64],
    geometry: NDArray[np.float64],
    shape: NDArray[np.int64],
    lo: int,
    hi: int,
    cells: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> None:
    """Cell of each point and how many each cell holds (counted one place up, ready to be summed)."""
    for p in range(lo, hi):
        cx = cell_of(coords[p, 0], geometry[0], geometry[3], shape[0])
        cy = cell_of(coords[p, 1], geometry[1], geometry[3], shape[1])
        c = cy * shape[0] + cx
        cells[p] = c
        counts[c] += 1


@njit
def starts_of(counts: NDArray[np.int32], starts: NDArray[np.int32]) -> tuple[int, int]:
    """Sum the counts into starts, per cell and thread; return the sum of squares and how many cells hold one point."""
    total = np.int32(0)
    crowd = 0
    alone = 0
    for c in range(counts.shape[1]):
        starts[c] = total
        here = 0
        for t in range(counts.shape[0]):
            n = counts[t, c]
            counts[t, c] = total
            total += n
            here += n
        crowd += here * here
        alone += here == 1
    starts[counts.shape[1]] = total
    return crowd, alone


@njit
def scatter(
    coords: NDArray[np.float64],
    lo: int,
    hi: int,
    cells: NDArray[np.int32],
    places: NDArray[np.int32],
    points: NDArray[np.float64],
    ids: NDArray[np.int32],
) -> None:
    """Move the points to their place in the order of the cells."""
    for p in range(lo, hi):
        c = cells[p]
        q = places[c]
        places[c] = q + 1
        points[q, 0] = coords[p, 0]
        points[q, 1] = coords[p, 1]
        ids[q] = p


@njit
def scan(
    points: NDArray[np.float64],
    ids: NDArray[np.int32],
    p: int,
    lo: int,
    hi: int,
    limit2: float,
    d2s: NDArray[np.float64],
    found: NDArray[np.int32],
    m: int,
) -> int:
    """Look at the points lo..hi for point `p`; return how many candidates it then holds."""
    capacity = d2s.shape[0]
    x, y = points[p, 0], points[p, 1]
    worst = d2s[capacity - 1] if m == capacity else limit2
    own = np.uint64(p)
    for q in range(np.uint64(lo), np.uint64(hi)):  # unsigned positions spare numba's test for negative ones
        dx = points[q, 0] - x
        dy = points[q, 1] - y
        d2 = dx * dx + dy * dy
        if d2 > worst or q == own:
            continue
        if m == capacity and d2 == worst and ids[q] > found[m - 1]:
            continue
        m = insert(d2s, found, m, d2, ids[q])
        if m == capacity:
            worst = d2s[m - 1]
    return m


@njit
def unseen(
    x: float, y: float, geometry: NDArray[np.float64], shape: NDArray[np.int64], cx: int, cy: int, r: int
) -> float:
    """Distance within which every point lies in the cells up to `r` around the cell of (x, y)."""
    x0, y0, h = geometry[0], geometry[1], geometry[2]
    least = np.inf
    if cx - r > 0:
        least = min(least, x - (x0 + (cx - r) * h))
    if cx + r < shape[0] - 1:
        least = min(least, x0 + (cx + r + 1) * h - x)
    if cy - r > 0:
        least = min(least, y - (y0 + (cy - r) * h))
    if cy + r < shape[1] - 1:
        least = min(least, y0 + (cy + r + 1) * h - y)
    return float(max(least - SLACK * h, 0.0))


@njit
def query(
    points: NDArray[np.float64],
    ids: NDArray[np.int32],
    starts: NDArray[np.int32],
    geometry: NDArray[np.float64],
    shape: NDArray[np.int64],
    queue: NDArray[np.int32],
    capacity: int,
    k: int,
    limit2: float,
    tolerance: float,
    keep_all: bool,  # noqa: FBT001
    rows: NDArray[np.int32],
    index: NDArray[np.int32],
    distance: NDArray[np.float32],
    short: NDArray[np.bool_],
) -> None:
    """Niches of the queued points (positions in cell order), written into `rows` of theirs."""
    d2s = np.empty(capacity)
    found = np.empty(capacity, np.int32)
    nx, ny = shape[0], shape[1]
    h = geometry[2]
    slack = SLACK * h
    last = queue.shape[0] - 1
    for at in range(queue.shape[0]):
        expect(rows, queue[min(at + _AHEAD, last)], index, distance)
        p = queue[at]
        x, y = points[p, 0], points[p, 1]
        cx = cell_of(x, geometry[0], geometry[3], nx)
        cy = cell_of(y, geometry[1], geometry[3], ny)
        m = 0
        r = 1
        need = limit2
        while True:
            for step in range(2 * r + 1):  # the own row of cells first, then those beside it
                row = cy + (step + 1) // 2 * (1 if step % 2 else -1)
                if row < 0 or row >= ny:
                    continue
                gap = max(geometry[1] + row * h - y, y - geometry[1] - (row + 1) * h) - slack
                if row != cy and gap > 0 and gap * gap > need:  # the own row may hold what lies beyond the grid
                    continue
                first = row * nx
                if r == 1 or step >= 2 * r - 1:
                    # whole rows: the 3 x 3 block, later the top and the bottom of the ring around what was seen
                    lo, hi = starts[first + max(cx - r, 0)], starts[first + min(cx + r, nx - 1) + 1]
                    m = scan(points, ids, p, lo, hi, limit2, d2s, found, m)
                else:
                    if cx - r >= 0:
                        lo, hi = starts[first + cx - r], starts[first + cx - r + 1]
                        m = scan(points, ids, p, lo, hi, limit2, d2s, found, m)
                    if cx + r < nx:
                        lo, hi = starts[first + cx + r], starts[first + cx + r + 1]
                        m = scan(points, ids, p, lo, hi, limit2, d2s, found, m)
                need = reach(d2s, m, k, tolerance, limit2)
            seen = unseen(x, y, geometry, shape, cx, cy, r)
            if seen * seen > need or seen == np.inf:
                break
            r += 1
        if not write_row(d2s, found, m, k, tolerance, keep_all, index[rows[p]], distance[rows[p]]):
            short[p] = True


@dataclass(frozen=True)
class Grid:
    """Points of the plane in the order of the cells of a uniform grid (geometry: x0, y0, side, 1 / side)."""

    points: NDArray[np.float64]
    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    geometry: NDArray[np.float64]
    shape: NDArray[np.int64]

    few: ClassVar[int] = 8192  # units of work below which threads gain nothing

    @classmethod
    def build(cls, coords: NDArray[np.float64], k: int, threads: int) -> Grid | None:
        """Return the grid, or None where the points are spread so unevenly that it would be slow."""
        # column by column: numpy takes thirty times as long along the first axis of so narrow an array
        low, high = (np.array([least(coords[:, a]) for a in range(2)]) for least in (np.min, np.max))
        grid = cls._within(coords, low, high - low, k, threads)
        if grid is not None or len(coords) < 100 * _FAR:
            return grid
        # some points far away: they are counted in the cells at the border of the others
        ordered = np.partition(coords, (_FAR, -1 - _FAR), axis=0)
        low, high = ordered[_FAR], ordered[-1 - _FAR]
        return cls._within(coords, low, high - low, k, threads)

    @classmethod
    def _within(
        cls, coords: NDArray[np.float64], low: NDArray[np.float64], span: NDArray[np.float64], k: int, threads: int
    ) -> Grid | None:
        """Return the grid over a frame, or None."""
        n = len(coords)
        if span.min() <= span.max() / n:
            return None  # all on one line
        per_cell = max(2.0, 0.3 * k)
        h = math.sqrt(span[0] * span[1] * per_cell / n)
        threads = 1 if n < 2**16 else min(threads, 4)  # each counts in a table of its own
        cells = np.empty(n, np.int32)
        borders = edges(n, threads)
        for _ in range(2):
            shape = np.ceil(span / h).astype(np.int64)
            if shape.prod() > 4 * n + 64:
                return None
            geometry = np.array([low[0], low[1], h, 1.0 / h])
            counts = np.zeros((threads, int(shape.prod())), np.int32)

            def count(t: int, _: int, g: NDArray[np.float64] = geometry, s: NDArray[np.int64] = shape) -> None:
                count_cells(coords, g, s, borders[t], borders[t + 1], cells, counts[t])  # noqa: B023

            run(count, threads, threads, inline=2)
            starts = np.empty(counts.shape[1] + 1, np.int32)
            crowd, alone = starts_of(counts, starts)
            mates = crowd / n - 1.0  # others in the cell of a point: per_cell where points are spread at random
            if mates <= _CROWDED * per_cell:
                break
            h *= math.sqrt(per_cell / mates)  # the tissue fills a part of its frame only
        if mates > _CROWDED * per_cell or alone > n // 2:
            return None
        points, ids = np.empty((n, 2)), np.empty(n, np.int32)

        def move(t: int, _: int) -> None:
            scatter(coords, borders[t], borders[t + 1], cells, counts[t], points, ids)

        run(move, threads, threads, inline=2)
        return cls(points, ids, starts, geometry, shape)

    def blocks(self, positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the units of work that answer for the points at some positions: here the positions."""
        return positions

    def positions(self, blocks: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the positions that some units of work answer for."""
        return blocks

    @property
    def n_blocks(self) -> int:
        """Number of units of work."""
        return len(self.ids)

    def query(
        self,
        blocks: NDArray[np.int32],
        capacity: int,
        rule: Rule,
        rows: NDArray[np.int32],
        index: NDArray[np.int32],
        distance: NDArray[np.float32],
        short: NDArray[np.bool_],
    ) -> None:
        """Write niches into `rows` of their positions; mark positions where `capacity` was too small."""
        query(
            self.points,
            self.ids,
            self.starts,
            self.geometry,
            self.shape,
            blocks,
            capacity,
            rule.k,
            rule.limit2,
            rule.tolerance,
            rule.keep_all,
            rows,
            index,
            distance,
            short,
        )
