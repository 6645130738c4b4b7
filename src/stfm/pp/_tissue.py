"""Where the tissue is on a small picture of a slide, and whether the spots lie on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MIN_CHROMA = 12  # Otsu levels below this split noise, not tissue from glass
_ON_ARRAY = 0.9  # share of the variance of the coordinates that positions on the array explain, where they are of use


def tissue_mask(picture: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Return where a picture shows stained tissue, bool ``(h, w)``, or None where nothing is coloured.

    Stain is coloured, glass and frame are grey: the difference of the largest and the smallest channel is split by
    Otsu's threshold.

    Parameters
    ----------
    picture
        uint8 ``(h, w, 3)``.
    """
    chroma = picture.max(axis=2).astype(np.int64) - picture.min(axis=2)
    level = otsu(np.bincount(chroma.ravel(), minlength=256))
    mask: NDArray[np.bool_] = chroma > level
    return mask if level >= _MIN_CHROMA and mask.any() else None


def otsu(histogram: NDArray[np.int64]) -> int:
    """Return the level that splits a histogram into the two classes of the greatest distance between their means."""
    weight = np.cumsum(histogram)
    total = weight[-1]
    moment = np.cumsum(histogram * np.arange(len(histogram)))
    below, above = weight, total - weight
    split = (below > 0) & (above > 0)
    between = np.zeros(len(histogram))
    difference = moment[split] / below[split] - (moment[-1] - moment[split]) / above[split]
    between[split] = below[split] * above[split] * difference**2
    # levels between two separate classes split equally well: the middle one
    return int(np.flatnonzero(between >= between.max() * (1 - 1e-12)).mean())


def on_tissue(mask: NDArray[np.bool_], xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points (x, y in px of the mask) lie on tissue, bool ``(n,)``; points off the picture do not."""
    col, row = np.floor(xy[:, 0]).astype(np.int64), np.floor(xy[:, 1]).astype(np.int64)
    inside = (row >= 0) & (row < mask.shape[0]) & (col >= 0) & (col < mask.shape[1])
    found = np.zeros(len(xy), np.bool_)
    found[inside] = mask[row[inside], col[inside]]
    return found


def exchanged_on_array(xy: NDArray[np.float64], positions: NDArray[np.float64]) -> bool:
    """Whether x runs along the rows of the array and y along its columns, as after an exchange of x and y.

    A slide that was scanned turned by 90 degrees has one of them run backwards; an exchange, which is a reflection, has
    both run forwards or both backwards. A turned slide therefore does not count.

    Parameters
    ----------
    xy
        Coordinates ``(n, 2)``.
    positions
        Column and row of the spots on the array ``(n, 2)``.
    """
    known = np.isfinite(positions).all(axis=1)
    centred, steps = (part[known] - part[known].mean(axis=0) for part in (xy, positions))
    if len(steps) < 3 or np.linalg.matrix_rank(steps) < 2:
        return False
    slopes = np.linalg.lstsq(steps, centred, rcond=None)[0]  # (column, row) x (x, y)
    spread = centred.var(axis=0)
    if (spread == 0).any() or ((centred - steps @ slopes).var(axis=0) > (1 - _ON_ARRAY) * spread).any():
        return False
    across = slopes[1, 0] * slopes[0, 1]  # x by row, y by column
    return bool(across > abs(slopes[0, 0] * slopes[1, 1]))
