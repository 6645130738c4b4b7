"""Sources of pixels: arrays, zarr, and image files that are decoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stfm._errors import InputError, WrongTypeError
from stfm._logging import get_logger
from stfm._settings import settings
from stfm.slide.readers.array import ArraySource, hash_pixels
from stfm.slide.readers.base import ImageSource, thumbnail, to_rgb

__all__ = ["ArraySource", "ImageSource", "keep_array", "open_image", "thumbnail"]

_VERSION = "v1"  # of the layout of kept pyramids


def open_image(image: Any, *, cache: bool = True) -> ImageSource:
    """Open whatever holds an H&E image.

    A TIFF, PNG or JPEG file is decoded once and kept as a tiled pyramid (zarr, lz4) in
    ``settings.cache_dir / "images"`` under the hash of its bytes; from then on only the blocks that are looked at are
    read.

    Parameters
    ----------
    image
        Array ``(h, w, 3)`` or ``(3, h, w)`` (uint8, or float in 0..1), Pillow image, zarr array or group, path of a
        zarr, TIFF, PNG or JPEG, or an object that already is an :class:`ImageSource`.
    cache
        Keep decoded files on disk; False decodes into memory.

    Returns
    -------
    The source of pixels.

    Raises
    ------
    InputError
        There is no such file, or its kind or its pixels cannot be used.
    DataIntegrityError
        The file is damaged or cut short.
    """
    if isinstance(image, (str, Path)):
        return _open_path(Path(image).expanduser(), cache=cache)
    if isinstance(image, np.ndarray):
        return ArraySource(image)
    if isinstance(image, ImageSource):
        return image
    if type(image).__module__.partition(".")[0] == "zarr":
        from stfm.slide.readers.zarr import ZarrSource

        return ZarrSource(image)
    if hasattr(image, "__array__") or hasattr(image, "__array_interface__"):
        return ArraySource(np.asarray(image))
    msg = f"An image is an array, a path (zarr, TIFF, PNG, JPEG) or an ImageSource; got {type(image).__name__}."
    raise WrongTypeError(msg)


def keep_array(image: Any) -> Path:
    """Keep an image that is only in memory as a tiled pyramid, and return its folder.

    Parameters
    ----------
    image
        Array or Pillow image, as for :func:`open_image`.

    Returns
    -------
    Folder under ``settings.cache_dir / "images"``, named after the hash of the pixels.
    """
    from stfm.slide.readers.zarr import BLOCK_PX, write_pyramid

    pixels = to_rgb(np.asarray(image), what="image")
    fingerprint = hash_pixels(pixels)
    target = _kept(fingerprint)
    if not target.exists():
        bands = (pixels[top : top + BLOCK_PX] for top in range(0, len(pixels), BLOCK_PX))
        write_pyramid(target, bands, (pixels.shape[0], pixels.shape[1]), fingerprint=fingerprint)
    return target


def _open_path(path: Path, *, cache: bool) -> ImageSource:
    from stfm.slide.readers.decode import SUFFIXES, decoded, hash_file
    from stfm.slide.readers.zarr import ZarrSource, writable, write_pyramid

    if not path.exists():
        msg = f"There is no image {str(path)!r}."
        raise InputError(msg)
    if path.is_dir():
        return ZarrSource(path)
    if path.suffix.lower() not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        msg = f"Images of kind {path.suffix or 'unknown'!r} are not read ({str(path)!r}); give a zarr or {kinds}."
        raise InputError(msg)
    if not cache:
        with decoded(path) as (_, bands, mpp):
            return ArraySource(np.concatenate(list(bands)), name=str(path), mpp=mpp)
    fingerprint = hash_file(path)
    target = _kept(fingerprint)
    if not target.exists():
        if not writable(target.parent):
            msg = f"The cache folder {str(target.parent)!r} cannot be written to; set STFM_CACHE to another one."
            raise InputError(msg)
        get_logger("slide").info("decoding %s once, kept in %s", path, target)
        with decoded(path) as (shape, bands, mpp):
            write_pyramid(target, bands, shape, fingerprint=fingerprint, mpp=mpp)
    source = ZarrSource(target)
    source.name = str(path)
    return source


def _kept(fingerprint: str) -> Path:
    return settings.cache_dir / "images" / f"{fingerprint[:32]}.{_VERSION}.zarr"
