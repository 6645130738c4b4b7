"""TIFF, PNG and JPEG files: decoded once, then kept as a tiled pyramid."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import DataIntegrityError, InputError
from stfm._logging import get_logger
from stfm.slide.readers.base import to_rgb
from stfm.slide.readers.zarr import BLOCK_PX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["SUFFIXES", "decoded", "hash_file"]

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
_MOST_PX = 4_000_000_000  # 12 GB in memory: larger images are whole-slide files
_pillow_limit = threading.Lock()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def decoded(path: Path) -> Iterator[tuple[tuple[int, int], Iterator[NDArray[np.uint8]], float | None]]:
    """Decode a file: height and width, bands of ``BLOCK_PX`` rows as uint8 RGB, and µm/px where the file says.

    Raises
    ------
    DataIntegrityError
        The file is cut short or is not an image.
    """
    if path.suffix.lower() in (".tif", ".tiff") and importlib.util.find_spec("tifffile") is not None:
        pixels, mpp = _tiff(path)
        if pixels is not None:
            yield (pixels.shape[0], pixels.shape[1]), _bands(pixels), mpp
            return
    from PIL import Image, UnidentifiedImageError

    image = None
    try:
        with _no_pillow_limit(Image):
            image = Image.open(path)
        _check_size(path, image.height * image.width)
        image.load()
    except UnidentifiedImageError as error:
        msg = f"{str(path)!r} is not an image that can be read (TIFF, PNG, JPEG), or its beginning is damaged."
        raise DataIntegrityError(msg) from error
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        msg = f"image file {str(path)!r} is damaged or cut short ({error}); fetch it again."
        raise DataIntegrityError(msg) from error
    else:
        yield (image.height, image.width), _pillow_bands(image, path), None
    finally:
        if image is not None:
            image.close()


@contextmanager
def _no_pillow_limit(module: Any) -> Iterator[None]:
    """Lift Pillow's limit on the size of images while one is opened; full-resolution H&E is beyond it."""
    with _pillow_limit:
        kept = module.MAX_IMAGE_PIXELS
        module.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            module.MAX_IMAGE_PIXELS = kept


def _check_size(path: Path, n_px: int) -> None:
    if n_px > _MOST_PX:
        msg = f"image {str(path)!r} has {n_px / 1e9:.1f} billion px, too many to decode at once; give a tiled zarr."
        raise InputError(msg)


def _pillow_bands(image: Any, path: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield bands as RGB, so that no second copy of the whole image is made."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        msg = f"image {str(path)!r} has {image.mode} pixels of more than 8 bits; give 8-bit RGB."
        raise InputError(msg)
    mode = "RGBA" if "A" in image.mode or "transparency" in image.info else "RGB"
    for top in range(0, image.height, BLOCK_PX):
        with _no_pillow_limit(Image):  # which also holds for crops
            band = image.crop((0, top, image.width, min(top + BLOCK_PX, image.height)))
        yield to_rgb(np.asarray(band if band.mode == mode else band.convert(mode)), what=f"image {str(path)!r}")


def _bands(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for top in range(0, len(pixels), BLOCK_PX):
        yield pixels[top : top + BLOCK_PX]


def _tiff(path: Path) -> tuple[NDArray[np.uint8] | None, float | None]:
    """Decode the finest picture of a TIFF with tifffile; None where only Pillow knows its compression."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            if not file.series:
                msg = f"{str(path)!r} is a TIFF without pictures."
                raise DataIntegrityError(msg)
            series = file.series[0]
            _check_size(path, int(np.prod(series.shape)))
            pixels = np.squeeze(series.asarray())
            mpp = _ome_mpp(file.ome_metadata)
    except tifffile.TiffFileError as error:
        msg = f"{str(path)!r} is not a TIFF, or it is damaged ({error})."
        raise DataIntegrityError(msg) from error
    except ImportError:  # imagecodecs is not installed
        get_logger("slide").info("tifffile lacks the codec of %s; Pillow decodes it", path)
        return None, None
    except (OSError, RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, (InputError, DataIntegrityError)):
            raise
        if "requires the 'imagecodecs' package" in str(error):
            return None, None
        msg = f"image file {str(path)!r} is damaged or cut short ({error}); fetch it again."
        raise DataIntegrityError(msg) from error
    return to_rgb(pixels, what=f"image {str(path)!r}"), mpp


def _ome_mpp(text: str | None) -> float | None:
    """Return ``PhysicalSizeX`` of OME-XML in µm."""
    if not text:
        return None
    from xml.etree import ElementTree as ET

    try:
        root = ET.fromstring(text)
    except ET.ParseError:
        return None
    for node in root.iter():
        if node.tag.endswith("Pixels") and "PhysicalSizeX" in node.attrib:
            unit = node.attrib.get("PhysicalSizeXUnit", "µm")
            factor = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}.get(unit)
            return None if factor is None else float(node.attrib["PhysicalSizeX"]) * factor
    return None
