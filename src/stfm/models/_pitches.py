"""How far apart neighbours are, in pitches of their slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stfm.slide.niches import knn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stfm.slide.niches import NicheTable

__all__ = ["pitches_apart"]


def pitches_apart(coords: NDArray[np.float64], n_neighbors: int) -> tuple[NicheTable, NDArray[np.int64], float]:
    """Return the nearest places of each place, and how many pitches away they are.

    Parameters
    ----------
    coords
        Two places or more, ``(n, 2)`` or ``(n, 3)``, in any unit.
    n_neighbors
        So many are looked at, or all others where there are fewer.

    Returns
    -------
    The table, the whole number of pitches to each of its entries (int64 ``(n, k)``; 0 where there is none), and the
    pitch, that is the median distance to the nearest other place, in the unit of ``coords``.
    """
    table = knn(coords, min(n_neighbors, len(coords) - 1))
    # Not the distance to a place of the same coordinates, as those of two sections on one array.
    nearest = np.where(table.distance > 0, table.distance, np.inf).min(axis=1)
    apart = nearest[np.isfinite(nearest)]
    pitch = float(np.median(apart)) if len(apart) else 0.0
    steps = np.rint(np.where(np.isfinite(table.distance), table.distance, 0.0) / max(pitch, 1e-9)).astype(np.int64)
    steps[table.index < 0] = 0
    return table, steps, pitch
