"""Tiles by physical size, cut from an image when they are asked for."""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_count, check_positive
from stfm.slide._threads import n_threads, run
from stfm.slide.readers import ImageSource, open_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

__all__ = ["ImageSource", "TileReader", "check_on_image", "open_image"]

_EXACT = 1e-3  # px: a tile that differs less from its size in px is copied, not resampled
_INLINE_BYTES = 2**21  # below, starting threads costs more than it gains
_PATCH_BYTES = 64 * 2**20  # undecoded tiles are read in groups of so much memory


class TileReader:
    """Square tiles around spots, read from an image by their size in µm.

    Nothing is cut before :meth:`read`, which takes the pyramid level just finer than what is asked for and then copies
    (same size), averages by area (shrinking) or interpolates bilinearly (enlarging). Beyond the image, tiles are white.

    Parameters
    ----------
    source
        The image.
    centers_px
        Centres of the tiles, x and y in px of the full-resolution image, ``(n, 2)``.
    mpp
        µm per px of the full-resolution image.
    image_scale
        px of ``source`` per px of the full-resolution image (``tissue_hires_scalef`` of Visium).
    """

    def __init__(self, source: ImageSource, centers_px: ArrayLike, mpp: float, *, image_scale: float = 1.0) -> None:
        check_positive("mpp", mpp)
        check_positive("image_scale", image_scale)
        centers = np.array(centers_px, dtype=np.float64)
        if centers.ndim != 2 or centers.shape[1] != 2 or not np.isfinite(centers).all():
            msg = f"centers_px must be finite and of shape (n, 2), got shape {centers.shape}."
            raise InputError(msg)
        self.source = source
        self.mpp = float(mpp)
        self.image_scale = float(image_scale)
        self._centers = centers * self.image_scale

    @property
    def n_obs(self) -> int:
        """Number of tiles."""
        return len(self._centers)

    @property
    def native_mpp(self) -> float:
        """µm per px of the image that is read."""
        return self.mpp / self.image_scale

    @property
    def centers(self) -> NDArray[np.float64]:
        """Centres of the tiles, x and y in px of the image that is read, float64 ``(n, 2)``."""
        return self._centers

    def subset(self, indices: ArrayLike) -> TileReader:
        """Return a reader of some of the tiles, from the same image."""
        other = copy.copy(self)
        other._centers = self._centers[np.asarray(indices)]
        return other

    def fingerprint(self) -> str:
        """Return a hash of the image, the scale and the centres."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(np.array([self.mpp, self.image_scale]).tobytes())
        digest.update(np.ascontiguousarray(self._centers).tobytes())
        return digest.hexdigest()

    def padded(self, size_um: float) -> NDArray[np.bool_]:
        """Return which tiles of a size go over the border of the image by more than half a px, bool ``(n,)``."""
        check_positive("size_um", size_um)
        half = size_um / self.native_mpp / 2 - 0.5
        limit = np.array(self.source.shape[::-1], dtype=np.float64)
        over: NDArray[np.bool_] = np.any((self._centers - half < 0) | (self._centers + half > limit), axis=1)
        return over

    def outside(self) -> NDArray[np.bool_]:
        """Return which centres do not lie on the image, bool ``(n,)``."""
        limit = np.array(self.source.shape[::-1], dtype=np.float64)
        off: NDArray[np.bool_] = np.any((self._centers < 0) | (self._centers >= limit), axis=1)
        return off

    def read(
        self, indices: ArrayLike, *, size_um: float, size_px: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Read tiles.

        Parameters
        ----------
        indices
            Which tiles, in the order wanted; repeats are allowed.
        size_um
            Side in µm.
        size_px
            Side in px of what is returned.
        out
            Buffer to fill, uint8 C-contiguous ``(m, size_px, size_px, 3)``.

        Returns
        -------
        ``out`` or a new array of the same kind.

        Raises
        ------
        InputError
            An index, a size or the buffer cannot be used.
        """
        index = self._index(indices)
        check_positive("size_um", size_um)
        check_count("size_px", size_px)
        shape = (len(index), size_px, size_px, 3)
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            msg = f"out must be C-contiguous uint8 {shape}, got {out.dtype} {out.shape}."
            raise InputError(msg)
        if len(index) == 0:
            return out
        level, side = self._level(size_um, size_px)
        center = self._centers[index] / self.source.downsamples[level]
        pixels = self.source.array(level)
        if pixels is None:
            self._read_blocks(level, center, side, out)
        else:
            _cut(pixels, center, side, out)
        return out

    def read_float(
        self,
        indices: ArrayLike,
        *,
        size_um: float,
        size_px: int,
        mean: ArrayLike = (0.0, 0.0, 0.0),
        std: ArrayLike = (1.0, 1.0, 1.0),
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Read tiles as an encoder wants them, float32 ``(m, 3, size_px, size_px)``: ``(value / 255 - mean) / std``.

        From an image in memory at its own resolution, tiles are cut and normalised in one pass. Other arguments as of
        :meth:`read`.
        """
        from stfm.slide import _tile_gather

        index = self._index(indices)
        check_positive("size_um", size_um)
        check_count("size_px", size_px)
        deviation = np.asarray(std, dtype=np.float32)
        scale = np.float32(1 / 255) / deviation
        shift = -np.asarray(mean, dtype=np.float32) / deviation
        shape = (len(index), 3, size_px, size_px)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            msg = f"out must be C-contiguous float32 {shape}, got {out.dtype} {out.shape}."
            raise InputError(msg)
        level, side = self._level(size_um, size_px)
        pixels = self.source.array(level)
        if pixels is None or abs(side - size_px) > _EXACT:
            tiles = self.read(index, size_um=size_um, size_px=size_px)
            _over_tiles(lambda lo, hi: _tile_gather.normalise(tiles, scale, shift, out, lo, hi), out)
            return out
        y0, x0 = _corners(self._centers[index] / self.source.downsamples[level], size_px)
        flat = _flat(pixels)
        _over_tiles(lambda lo, hi: _tile_gather.gather_float(flat, y0, x0, scale, shift, out, lo, hi), out)
        return out

    def _index(self, indices: ArrayLike) -> NDArray[np.int64]:
        index = np.asarray(indices)
        if index.dtype == np.bool_:
            index = np.flatnonzero(index)
        index = np.atleast_1d(index).astype(np.int64, copy=False)
        if len(index) and (index.min() < 0 or index.max() >= self.n_obs):
            msg = f"tiles are numbered 0 to {self.n_obs - 1}, asked for {index.min()} to {index.max()}."
            raise InputError(msg)
        return index

    def _level(self, size_um: float, size_px: int) -> tuple[int, float]:
        """Return the level just finer than what is asked for, and the side of the tiles in its px."""
        side = size_um / self.native_mpp
        zoom = side / size_px * (1 + 1e-6)
        level = max((i for i, d in enumerate(self.source.downsamples) if d <= zoom), default=0)
        return level, side / self.source.downsamples[level]

    def _read_blocks(self, level: int, center: NDArray[np.float64], side: float, out: NDArray[np.uint8]) -> None:
        """Read from an image on disk: tiles in the order of the blocks, each block decoded once a group."""
        from stfm.slide import _tile_gather

        size = out.shape[1]
        exact = abs(side - size) <= _EXACT
        patch_px = size if exact else int(np.ceil(side)) + 3
        if exact:
            y0, x0 = _corners(center, size)
        else:
            y0, x0 = (np.floor(center[:, k] - side / 2).astype(np.int64) - 1 for k in (1, 0))
        block = self.source.block_shape(level)
        order = np.lexsort(((x0 + patch_px // 2) // block[1], (y0 + patch_px // 2) // block[0]))
        group = max(1, _PATCH_BYTES // (patch_px * patch_px * 3))
        height, width = self.source.level_shape(level)
        for start in range(0, len(order), group):
            rows = order[start : start + group]
            patches = np.full((len(rows), patch_px, patch_px * 3), _tile_gather.WHITE, np.uint8)
            self._fill(level, y0[rows], x0[rows], patches)
            if exact:
                out[rows] = patches.reshape(len(rows), size, size, 3)
                continue
            # The patches are stacked to one tall image, each with the part of it that is image.
            shift = np.arange(len(rows)) * patch_px
            bounds = np.stack(
                (
                    np.maximum(-y0[rows], 0) + shift,
                    np.minimum(height - y0[rows], patch_px) + shift,
                    np.maximum(-x0[rows], 0),
                    np.minimum(width - x0[rows], patch_px),
                ),
                axis=1,
            )
            corner_y = center[rows, 1] - side / 2 - y0[rows] + shift
            corner_x = center[rows, 0] - side / 2 - x0[rows]
            cut = np.empty((len(rows), size, size, 3), np.uint8)
            _resample(patches.reshape(-1, patch_px * 3), corner_y, corner_x, side, bounds, cut)
            out[rows] = cut

    def _fill(self, level: int, y0: NDArray[np.int64], x0: NDArray[np.int64], patches: NDArray[np.uint8]) -> None:
        """Fill patches ``(m, px, px * 3)`` from the blocks under them."""
        from stfm.slide import _tile_gather

        px = patches.shape[1]
        (bh, bw), (height, width) = self.source.block_shape(level), self.source.level_shape(level)
        first_y, last_y = np.maximum(y0, 0) // bh, (np.minimum(y0 + px, height) - 1) // bh
        first_x, last_x = np.maximum(x0, 0) // bw, (np.minimum(x0 + px, width) - 1) // bw
        wanted: dict[tuple[int, int], list[int]] = {}
        for i in range(len(y0)):
            for by in range(first_y[i], last_y[i] + 1):
                for bx in range(first_x[i], last_x[i] + 1):
                    wanted.setdefault((by, bx), []).append(i)
        for (by, bx), tiles in wanted.items():
            top, left = by * bh, bx * bw
            pixels = self.source.read(level, top, left, min(bh, height - top), min(bw, width - left))
            index = np.array(tiles, dtype=np.int64)
            _tile_gather.scatter(_flat(pixels), top, left, index, y0, x0, patches, 0, len(index))


def check_on_image(reader: TileReader, library: str, *, allowed: float = 0.0) -> None:
    """Refuse coordinates that are not those of the image.

    Parameters
    ----------
    reader
        Of the tiles of a library.
    library
        Its name.
    allowed
        Share of the spots that may lie off the image.
    """
    outside = reader.outside()
    if not outside.any() or outside.mean() <= allowed:
        return
    height, width = reader.source.shape
    low, high = reader.centers.min(axis=0), reader.centers.max(axis=0)
    exchanged = reader.centers[:, ::-1]
    msg = (
        f"Library {library!r}: {int(outside.sum())} of {reader.n_obs} spots lie off the image (x {low[0]:.0f} to "
        f"{high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f} px on {width} x {height} px). Is this the image of that "
        "section, at this resolution (image_scale=, tissue_*_scalef), and are the coordinates px of the "
        "full-resolution image (not µm)?"
    )
    if ((exchanged >= 0) & (exchanged < (width, height))).all():
        msg += " With x and y exchanged all lie on it: adata.obsm['spatial'] must be (x, y), not (row, column)."
    raise InputError(msg)


def _corners(center: NDArray[np.float64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the upper left corners of tiles at whole px, rows and columns."""
    corner = np.floor(center - size / 2 + 0.5).astype(np.int64)
    return np.ascontiguousarray(corner[:, 1]), np.ascontiguousarray(corner[:, 0])


def _flat(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image ``(h, w, 3)`` as rows of ``w * 3`` bytes."""
    return np.ascontiguousarray(pixels).reshape(pixels.shape[0], -1)


def _cut(pixels: NDArray[np.uint8], center: NDArray[np.float64], side: float, out: NDArray[np.uint8]) -> None:
    """Cut tiles from an image in memory."""
    from stfm.slide import _tile_gather

    size = out.shape[1]
    flat = _flat(pixels)
    if abs(side - size) <= _EXACT:
        y0, x0 = _corners(center, size)
        rows = out.reshape(len(out), size, -1)
        _over_tiles(lambda lo, hi: _tile_gather.gather(flat, y0, x0, rows, lo, hi), out)
        return
    corner = center - side / 2
    bounds = np.tile(np.array([0, pixels.shape[0], 0, pixels.shape[1]], dtype=np.int64), (len(center), 1))
    _resample(flat, np.ascontiguousarray(corner[:, 1]), np.ascontiguousarray(corner[:, 0]), side, bounds, out)


def _resample(
    flat: NDArray[np.uint8],
    y0: NDArray[np.float64],
    x0: NDArray[np.float64],
    side: float,
    bounds: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """Shrink or enlarge tiles from rows of ``w * 3`` bytes."""
    from stfm.slide import _tile_gather

    kernel = _tile_gather.shrink if side > out.shape[1] else _tile_gather.enlarge
    work = len(out) * max(side, out.shape[1]) ** 2 * 3
    _over_tiles(lambda lo, hi: kernel(flat, y0, x0, side, bounds, out, lo, hi), out, work=work * 8)


def _over_tiles(work_on: Callable[[int, int], object], out: NDArray[Any], *, work: float | None = None) -> None:
    """Run a loop over tiles on the threads there are; small jobs on the calling thread."""
    small = (out.nbytes if work is None else work) < _INLINE_BYTES
    run(work_on, len(out), n_threads(), inline=len(out) + 1 if small else 2)
