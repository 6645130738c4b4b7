"""Decoded tiles kept in memory between epochs, as far as a budget goes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from stfm.models.inputs import SlideInputs
    from stfm.slide.tiles import TileReader

__all__ = ["Budget", "CachedTiles", "keep_tiles"]


class Budget:
    """Bytes that may still be used, shared by the slides of a run."""

    def __init__(self, gigabytes: float) -> None:
        self.left = int(gigabytes * 1e9)

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; False where they are not there."""
        if size > self.left:
            return False
        self.left -= size
        return True


class CachedTiles:
    """Stands in for a :class:`~stfm.slide.tiles.TileReader` and reads each tile from the image once.

    Tiles of one size are filled in as they are asked for, so the first epoch costs what it would without a cache.

    Parameters
    ----------
    tiles
        The reader.
    budget
        Bytes to take from; a size that does not fit is read from the image each time.
    """

    def __init__(self, tiles: TileReader, budget: Budget) -> None:
        self._tiles = tiles
        self._budget = budget
        self._kept: dict[tuple[float, int], tuple[NDArray[np.uint8], NDArray[np.bool_]] | None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tiles, name)

    def read(
        self, indices: ArrayLike, *, size_um: float, size_px: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Return tiles like the reader does: uint8 ``(m, size_px, size_px, 3)``."""
        index = np.asarray(indices, dtype=np.int64)
        kept = self._store(size_um, size_px)
        if kept is None:
            return self._tiles.read(index, size_um=size_um, size_px=size_px, out=out)
        pixels, there = kept
        missing = np.unique(index[~there[index]])
        if len(missing):
            pixels[missing] = self._tiles.read(missing, size_um=size_um, size_px=size_px)
            there[missing] = True
        return np.take(pixels, index, axis=0, out=out)

    def _store(self, size_um: float, size_px: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        key = (float(size_um), int(size_px))
        if key not in self._kept:
            shape = (self._tiles.n_obs, size_px, size_px, 3)
            fits = self._budget.take(int(np.prod(shape)))
            self._kept[key] = (np.empty(shape, np.uint8), np.zeros(shape[0], bool)) if fits else None
        return self._kept[key]


def keep_tiles(inputs: Sequence[SlideInputs], gigabytes: float) -> None:
    """Give slides readers that keep what they decode, within ``gigabytes`` for all of them."""
    budget = Budget(gigabytes)
    for one in inputs:
        if one.slide.tiles is not None:
            # It reads like a TileReader, which is all that a slide asks of its reader.
            one.slide = replace(one.slide, tiles=CachedTiles(one.slide.tiles, budget))  # type: ignore[arg-type]
