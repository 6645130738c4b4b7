"""What a source of pixels offers, and how arrays become 8-bit RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from stfm._errors import InputError, WrongTypeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: longest side of the picture that stands for a whole image (tissue mask, overview plots)
THUMBNAIL_PX = 512


@runtime_checkable
class ImageSource(Protocol):
    """An H&E image, whole or as a pyramid, that is read piece by piece.

    ``shape`` is height and width of level 0, ``downsamples`` how many px of level 0 make a px of each level (1 first,
    then growing), ``mpp`` µm per px of level 0 by the file's own metadata.
    """

    name: str
    shape: tuple[int, int]
    downsamples: tuple[float, ...]
    mpp: float | None

    def level_shape(self, level: int) -> tuple[int, int]:
        """Return height and width of a level."""
        ...

    def block_shape(self, level: int) -> tuple[int, int]:
        """Return height and width of the pieces that are decoded at once."""
        ...

    def array(self, level: int) -> NDArray[np.uint8] | None:
        """Return a level as one array where it lies in memory, else None."""
        ...

    def read(self, level: int, y0: int, x0: int, h: int, w: int) -> NDArray[np.uint8]:
        """Return a window that lies inside the image, uint8 ``(h, w, 3)``, in px of the level."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content."""
        ...


def channels_last(shape: tuple[int, ...], *, what: str) -> bool:
    """Return True for ``(h, w, c)``, False for ``(c, h, w)``; refuse everything else."""
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        return True
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        return False
    msg = f"{what} has shape {shape}; expected (height, width, 3) or (3, height, width)."
    raise InputError(msg)


def to_rgb(pixels: NDArray[np.generic], *, what: str) -> NDArray[np.uint8]:
    """Return an image as C-contiguous uint8 ``(h, w, 3)``.

    Grey becomes three equal channels, transparency is laid on white, floats in 0..1 are scaled. Other types are
    refused: which of their values is white cannot be known.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if not channels_last(pixels.shape, what=what):
        pixels = np.moveaxis(pixels, 0, -1)
    if 0 in pixels.shape:
        msg = f"{what} is empty (shape {pixels.shape})."
        raise InputError(msg)
    rgb = _to_uint8(pixels, what=what)
    if rgb.shape[2] == 1:
        rgb = np.repeat(rgb, 3, axis=2)
    elif rgb.shape[2] == 4:
        alpha = rgb[:, :, 3:].astype(np.uint16)
        over_white = rgb[:, :, :3] * alpha + 255 * (255 - alpha)
        rgb = ((over_white + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(rgb)


def _to_uint8(pixels: NDArray[np.generic], *, what: str) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels.view(np.uint8)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(pixels.dtype, np.floating):
        msg = f"{what} has pixels of type {pixels.dtype}; give uint8 (0..255) or floats in 0..1."
        raise WrongTypeError(msg)
    low, high = float(np.min(pixels)), float(np.max(pixels))
    if not (low >= 0.0 and high <= 1.0):
        msg = f"{what} has float pixels from {low:.4g} to {high:.4g}; floats must lie in 0..1 (or give uint8)."
        raise InputError(msg)
    out = np.empty(pixels.shape, np.uint8)
    for row in range(0, len(pixels), 1024):  # in bands, so that a large image is not there a third time
        out[row : row + 1024] = np.asarray(pixels[row : row + 1024], dtype=np.float32) * 255.0 + 0.5
    return out


def halve(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image at half its size: the mean of every 2 x 2 px (an odd last row or column is repeated)."""
    h, w = pixels.shape[:2]
    out = np.empty(((h + 1) // 2, (w + 1) // 2, 3), np.uint8)
    for row in range(0, h, 512):
        band = pixels[row : row + 512]
        if band.shape[0] % 2 or w % 2:
            band = np.pad(band, ((0, band.shape[0] % 2), (0, w % 2), (0, 0)), mode="edge")
        total = band[0::2, 0::2].astype(np.uint16)
        for dy, dx in ((0, 1), (1, 0), (1, 1)):
            total += band[dy::2, dx::2]
        out[row // 2 : row // 2 + total.shape[0]] = (total + 2) >> 2
    return out


def thumbnail(source: ImageSource, longest: int = THUMBNAIL_PX) -> tuple[NDArray[np.uint8], float]:
    """Return a small picture of a whole image, and its px per px of level 0.

    It is the coarsest level that is not smaller than ``longest``, thinned to every n-th px.
    """
    target = max(source.shape) / longest
    level = max((i for i, d in enumerate(source.downsamples) if d <= max(target, 1.0)), default=0)
    h, w = source.level_shape(level)
    step = max(1, -(-max(h, w) // longest))
    whole = source.array(level)
    if whole is not None:
        picture = whole[::step, ::step]
    else:
        block = max(step, source.block_shape(level)[0] // step * step)
        rows = [source.read(level, y, 0, min(block, h - y), w)[::step, ::step] for y in range(0, h, block)]
        picture = np.concatenate(rows)
    return np.ascontiguousarray(picture), 1.0 / (step * source.downsamples[level])
