"""Exact neighbours through a balanced k-d tree, searched leaf by leaf: for clustered points, outliers and 3-D.

The tree is implicit: node j of level l holds the positions n*j >> l to n*(j+1) >> l of the reordered points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stfm.slide._niche_kernels import Rule, expect, insert, njit, reach, write_row
from stfm.slide._threads import run

_DIMS = 3  # of the points as they are kept, 0 where there is no third: loops of a known length are a quarter faster
_LEAF = 28  # points of a leaf, at most
_CROWN = 6  # levels that are split one by one; below them each thread builds whole branches


@njit
def swap(points: NDArray[np.float64], ids: NDArray[np.int32], p: int, q: int) -> None:
    """Exchange two points."""
    for a in range(_DIMS):
        points[p, a], points[q, a] = points[q, a], points[p, a]
    ids[p], ids[q] = ids[q], ids[p]


@njit
def split(points: NDArray[np.float64], ids: NDArray[np.int32], lo: int, hi: int, mid: int, axis: int) -> None:
    """Reorder lo..hi so that nothing before `mid` lies beyond it along `axis` (quickselect, median of three)."""
    first, last = lo, hi - 1
    while first < last:
        u, v, w = points[first, axis], points[(first + last) >> 1, axis], points[last, axis]
        pivot = max(min(u, v), min(max(u, v), w))
        p, q = first, last
        while p <= q:
            while points[p, axis] < pivot:
                p += 1
            while points[q, axis] > pivot:
                q -= 1
            if p <= q:
                swap(points, ids, p, q)
                p += 1
                q -= 1
        if mid <= q:
            last = q
        elif mid >= p:
            first = p
        else:
            return


@njit
def build(
    points: NDArray[np.float64],
    ids: NDArray[np.int32],
    boxes: NDArray[np.float64],
    level: int,
    node: int,
    stop: int,
) -> None:
    """Boxes and splits of everything below one node, from its level to before level `stop`."""
    n = points.shape[0]
    depth = level
    while depth < stop:
        width = 1 << (depth - level)
        for j in range(node * width, (node + 1) * width):
            lo, hi = (n * j) >> depth, (n * (j + 1)) >> depth
            box = boxes[(1 << depth) + j]
            axis = 0
            for a in range(_DIMS):
                low, high = np.inf, -np.inf
                for p in range(lo, hi):
                    low = min(low, points[p, a])
                    high = max(high, points[p, a])
                box[a] = low
                box[_DIMS + a] = high
                if high - low > box[_DIMS + axis] - box[axis]:
                    axis = a
            if 2 << depth < boxes.shape[0]:
                split(points, ids, lo, hi, (n * (2 * j + 1)) >> (depth + 1), axis)
        depth += 1


@njit
def box_gap2(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Squared distance between two boxes."""
    total = 0.0
    for a in range(_DIMS):
        gap = max(other[a] - one[_DIMS + a], one[a] - other[_DIMS + a])
        if gap > 0.0:
            total += gap * gap
    return total


@njit
def point_gap2(points: NDArray[np.float64], p: int, box: NDArray[np.float64]) -> float:
    """Squared distance from a point to a box."""
    total = 0.0
    for a in range(_DIMS):
        v = points[p, a]
        gap = max(box[a] - v, v - box[_DIMS + a])
        if gap > 0.0:
            total += gap * gap
    return total


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
    own = np.uint64(p)
    x, y, z = points[p, 0], points[p, 1], points[p, 2]
    worst = d2s[capacity - 1] if m == capacity else limit2
    for q in range(np.uint64(lo), np.uint64(hi)):  # unsigned positions spare numba's test for negative ones
        dx, dy, dz = points[q, 0] - x, points[q, 1] - y, points[q, 2] - z
        d2 = dx * dx + dy * dy + dz * dz
        if d2 > worst or q == own:
            continue
        if m == capacity and d2 == worst and ids[q] > found[m - 1]:
            continue
        m = insert(d2s, found, m, d2, ids[q])
        if m == capacity:
            worst = d2s[m - 1]
    return m


@njit
def walk(
    points: NDArray[np.float64],
    ids: NDArray[np.int32],
    boxes: NDArray[np.float64],
    leaf: int,
    branch: int,
    stack: NDArray[np.int64],
    k: int,
    limit2: float,
    tolerance: float,
    d2s: NDArray[np.float64],
    found: NDArray[np.int32],
    held: NDArray[np.int64],
    need: NDArray[np.float64],
) -> None:
    """Look below one branch for the points of a leaf that still need it."""
    n = points.shape[0]
    leaves = boxes.shape[0] >> 1
    lo, hi = n * leaf // leaves, n * (leaf + 1) // leaves
    own = boxes[leaves + leaf]
    most = need[: hi - lo].max()
    stack[0] = branch
    top = 1
    while top:
        top -= 1
        node = stack[top]
        if box_gap2(own, boxes[node]) > most:
            continue
        if node < leaves:
            one, two = 2 * node, 2 * node + 1
            if box_gap2(own, boxes[one]) < box_gap2(own, boxes[two]):
                one, two = two, one
            stack[top] = one
            stack[top + 1] = two
            top += 2
            continue
        a, b = n * (node - leaves) // leaves, n * (node - leaves + 1) // leaves
        for p in range(lo, hi):
            s = p - lo
            if point_gap2(points, p, boxes[node]) <= need[s]:
                held[s] = scan(points, ids, p, a, b, limit2, d2s[s], found[s], held[s])
                need[s] = reach(d2s[s], held[s], k, tolerance, limit2)
        most = need[: hi - lo].max()


@njit
def query(
    points: NDArray[np.float64],
    ids: NDArray[np.int32],
    boxes: NDArray[np.float64],
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
    """Niches of all points of the given leaves; the points of a leaf walk the tree together."""
    n = points.shape[0]
    leaves = boxes.shape[0] >> 1
    widest = n // leaves + 1
    d2s = np.empty((widest, capacity))
    found = np.empty((widest, capacity), np.int32)
    held = np.empty(widest, np.int64)
    need = np.empty(widest)
    stack = np.empty(64, np.int64)  # two a level, of at most 31
    for leaf in queue:
        lo, hi = n * leaf // leaves, n * (leaf + 1) // leaves
        for p in range(lo, hi):
            s = p - lo
            expect(rows, p, index, distance)
            held[s] = scan(points, ids, p, lo, hi, limit2, d2s[s], found[s], 0)
            need[s] = reach(d2s[s], held[s], k, tolerance, limit2)
        up = leaves + leaf
        while up > 1:  # the nearest part of the tree first: siblings on the way to the root
            walk(points, ids, boxes, leaf, up ^ 1, stack, k, limit2, tolerance, d2s, found, held, need)
            up >>= 1
        for p in range(lo, hi):
            s = p - lo
            if not write_row(d2s[s], found[s], held[s], k, tolerance, keep_all, index[rows[p]], distance[rows[p]]):
                short[p] = True


@dataclass(frozen=True)
class Tree:
    """Points in the order of a balanced k-d tree; `boxes` holds low and high corner of every node, the root first."""

    points: NDArray[np.float64]
    ids: NDArray[np.int32]
    boxes: NDArray[np.float64]

    few: ClassVar[int] = 128  # units of work below which threads gain nothing

    @classmethod
    def build(cls, coords: NDArray[np.float64], threads: int) -> Tree:
        """Return the tree of the points."""
        n = len(coords)
        depth = 0
        while (n >> depth) >= _LEAF:
            depth += 1
        points, ids = np.zeros((n, _DIMS)), np.arange(n, dtype=np.int32)
        points[:, : coords.shape[1]] = coords
        boxes = np.empty((2 << depth, 2 * _DIMS))
        crown = min(_CROWN, depth) if n > 2**14 else 0
        for level in range(crown):
            _grow(points, ids, boxes, level, level + 1, threads)
        _grow(points, ids, boxes, crown, depth + 1, threads)
        return cls(points, ids, boxes)

    def blocks(self, positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the units of work that answer for the points at some positions: their leaves."""
        return np.unique(np.searchsorted(self._borders(), positions, side="right") - 1).astype(np.int32)

    def positions(self, blocks: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the positions that some units of work answer for."""
        borders = self._borders()
        return np.concatenate([np.arange(borders[j], borders[j + 1], dtype=np.int32) for j in blocks])

    @property
    def n_blocks(self) -> int:
        """Number of units of work."""
        return len(self.boxes) // 2

    def _borders(self) -> NDArray[np.int64]:
        """Return the positions at which leaves begin, and the end."""
        return np.arange(self.n_blocks + 1, dtype=np.int64) * len(self.ids) // self.n_blocks

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
            self.boxes,
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


def _grow(
    points: NDArray[np.float64], ids: NDArray[np.int32], boxes: NDArray[np.float64], level: int, stop: int, threads: int
) -> None:
    """Build the levels from `level` to before `stop`, node by node of the first."""

    def work(lo: int, hi: int) -> None:
        for node in range(lo, hi):
            build(points, ids, boxes, level, node, stop)

    run(work, 1 << level, threads, parts=4, inline=2)
