"""An image that lies in memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from stfm.slide.readers.base import to_rgb

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["ArraySource", "hash_pixels"]


class ArraySource:
    """An array as an image of one level.

    Parameters
    ----------
    pixels
        ``(h, w, 3)`` or ``(3, h, w)``, uint8 or float in 0..1; grey and RGBA are accepted.
    name
        Name for messages.
    mpp
        µm per px, where known.
    """

    def __init__(self, pixels: ArrayLike, *, name: str = "array", mpp: float | None = None) -> None:
        self._pixels = to_rgb(np.asarray(pixels), what=f"image {name!r}")
        self._fingerprint: str | None = None
        self.name = name
        self.mpp = mpp
        self.shape: tuple[int, int] = self._pixels.shape[:2]
        self.downsamples: tuple[float, ...] = (1.0,)

    def level_shape(self, level: int) -> tuple[int, int]:
        """Return height and width."""
        return self.shape

    def block_shape(self, level: int) -> tuple[int, int]:
        """Return height and width: all of it is decoded."""
        return self.shape

    def array(self, level: int) -> NDArray[np.uint8]:
        """Return the pixels, uint8 ``(h, w, 3)``."""
        return self._pixels

    def read(self, level: int, y0: int, x0: int, h: int, w: int) -> NDArray[np.uint8]:
        """Return a window, uint8 ``(h, w, 3)``."""
        return self._pixels[y0 : y0 + h, x0 : x0 + w]

    def fingerprint(self) -> str:
        """Return a hash of shape and pixels."""
        if self._fingerprint is None:
            self._fingerprint = hash_pixels(self._pixels)
        return self._fingerprint


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """Return the sha256 of the shape and the bytes of an image."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
