"""Windows of neighbours around every spot: 5 x 5 on a lattice, the nearest by distance elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_count
from stfm.slide.niches import knn
from stfm.slide.units import detect_lattice

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["window_table"]

#: rows of a hexagonal lattice lie so many pitches apart
_HEX_ROW = math.sqrt(3) / 2
#: a spot may lie this far (in pitches) from its place on the lattice
_SLACK = 0.25


def window_table(coords: ArrayLike, size: int = 25, *, name: str = "the slide") -> NDArray[np.int32]:
    """Return the spots in the window of each spot.

    On a regular lattice a window of 25 is 5 x 5: five rows, and in each the five places nearest to the middle (on a
    hexagonal lattice every second row lies half a pitch aside and its window to the right). Places without a spot, at
    the border of the tissue, stay empty. Elsewhere a window holds the ``size`` nearest spots, the spot itself first.

    Parameters
    ----------
    coords
        Coordinates of the spots of one slide, ``(n, 2)`` or ``(n, 3)``, any unit.
    size
        Spots in a window. On a lattice only squares of odd numbers (9, 25, 49 ...) give square windows; other sizes
        take the nearest spots there too.
    name
        Of the slide, for messages.

    Returns
    -------
    int32 ``(n, size)``: the spot itself in the first column, the others by distance, -1 where there is none.

    Raises
    ------
    InputError
        The window is larger than the slide, or a coordinate is not finite.
    """
    check_count("window", size)
    points = np.asarray(coords, dtype=np.float64)
    n = len(points)
    if size > n:
        msg = (
            f"a window of {size} spots is larger than {name}, which has {n}. Leave slides as small out, or train a new "
            "model with a smaller window, config={'window': 9} of sf.tl.train; a trained model keeps the window it has."
        )
        raise InputError(msg)
    own = np.arange(n, dtype=np.int32)[:, None]
    if size == 1:
        return own
    half = (math.isqrt(size) - 1) // 2
    lattice = detect_lattice(points) if (2 * half + 1) ** 2 == size and points.shape[1] == 2 else None
    if lattice is None or lattice.kind == "none" or lattice.pitch is None:
        return np.concatenate([own, knn(points, size - 1).index], axis=1)
    neighbours = _box(points / lattice.pitch, half, hexagonal=lattice.kind == "hex")
    return _left(np.concatenate([own, neighbours], axis=1), size)


def _box(points: NDArray[np.float64], half: int, *, hexagonal: bool) -> NDArray[np.int32]:
    """Return the neighbours within ``half`` rows and places, -1 for the others; ``points`` in pitches."""
    reach = (half + 0.5) * math.sqrt(2) + _SLACK
    table = knn(points, None, radius=reach).index
    turned = points @ _axes(points, hexagonal=hexagonal)
    offset = turned[np.maximum(table, 0)] - turned[:, None]
    row = np.rint(offset[..., 1] / (_HEX_ROW if hexagonal else 1.0))
    # In an odd row of a hexagonal lattice the places are ..., -1.5, -0.5, 0.5, 1.5, 2.5: one step more to the right.
    aside = 0.5 * (row % 2) if hexagonal else 0.0
    inside = (np.abs(row) <= half) & (np.abs(offset[..., 0] - aside) < half + 0.5)
    return np.where(inside & (table >= 0), table, -1).astype(np.int32)


def _axes(points: NDArray[np.float64], *, hexagonal: bool) -> NDArray[np.float64]:
    """Return the matrix that turns the rows of a lattice into the direction of x."""
    fold = 6 if hexagonal else 4
    nearest = knn(points, fold, radius=1.0 + _SLACK)
    spots = np.broadcast_to(np.arange(len(points))[:, None], nearest.index.shape)
    there = nearest.index >= 0
    bonds = points[nearest.index[there]] - points[spots[there]]
    angle = np.angle(np.exp(1j * fold * np.arctan2(bonds[:, 1], bonds[:, 0])).sum()) / fold
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _left(table: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """Move the empty places of every row behind the spots, whose order stays, and cut or fill to ``size``."""
    order = np.argsort(table < 0, axis=1, kind="stable")[:, :size]
    kept = np.take_along_axis(table, order, axis=1)
    return np.pad(kept, ((0, 0), (0, size - kept.shape[1])), constant_values=-1)
