"""Where the tissue is on a small picture of a slide, and whether the spots lie on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MIN_CHROMA = 12  # Otsu levels below this split noise, not tissue from glass


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
