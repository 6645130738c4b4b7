"""Images in zarr: the tiled pyramids that stfm keeps, plain arrays, and OME-Zarr."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import DataIntegrityError, InputError, WrongTypeError
from stfm.slide.readers.base import channels_last, halve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

__all__ = ["BLOCK_PX", "ZarrSource", "write_pyramid"]

BLOCK_PX = 1024  # dense spots share blocks: larger ones are read faster than 512 px (lz4), see benchmarks/tiles.py
_COARSEST_PX = 512  # no level is smaller than this
_KEPT_BYTES = 256 * 2**20  # decoded blocks that stay in memory, for batches in random order


class ZarrSource:
    """A zarr array or group of arrays as an image with levels.

    Parameters
    ----------
    path
        Folder of a zarr array ``(h, w, 3)`` or ``(3, h, w)``, of a group with arrays ``0``, ``1``, ..., or of an
        OME-Zarr image; or an open zarr array or group.
    kept_bytes
        Decoded blocks are kept up to this size, the ones used last.
    """

    def __init__(self, path: str | Path | Any, *, kept_bytes: int = _KEPT_BYTES) -> None:
        self.name = str(getattr(path, "store_path", path))
        self._arrays, attrs = _open_levels(path)
        self._last = [channels_last(a.shape[-3:], what=f"zarr image {self.name!r}") for a in self._arrays]
        for array in self._arrays:
            if array.dtype != np.uint8:
                msg = f"zarr image {self.name!r} has pixels of type {array.dtype}; expected uint8."
                raise WrongTypeError(msg)
            if (array.shape[-1] if self._last[0] else array.shape[-3]) != 3:
                msg = f"zarr image {self.name!r} has shape {array.shape}; expected three channels."
                raise InputError(msg)
        self.shape = self.level_shape(0)
        self.downsamples = tuple(self.shape[0] / self.level_shape(i)[0] for i in range(len(self._arrays)))
        own = attrs.get("stfm", {})
        if own:
            self.downsamples = tuple(float(2**i) for i in range(len(self._arrays)))
        self.mpp: float | None = own.get("mpp") or _ome_mpp(attrs)
        self._fingerprint: str | None = own.get("fingerprint")
        self._kept: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave lock and blocks behind when sent to another process."""
        return {**self.__dict__, "_lock": None, "_kept": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def level_shape(self, level: int) -> tuple[int, int]:
        """Return height and width of a level."""
        return self._plane(self._arrays[level].shape, level)

    def block_shape(self, level: int) -> tuple[int, int]:
        """Return height and width of a chunk."""
        return self._plane(self._arrays[level].chunks, level)

    def array(self, level: int) -> None:
        """Return None: the pixels are on disk."""
        return

    def read(self, level: int, y0: int, x0: int, h: int, w: int) -> NDArray[np.uint8]:
        """Return a window, uint8 ``(h, w, 3)``; a window that is one block is kept in memory for the next time."""
        bh, bw = self.block_shape(level)
        height, width = self.level_shape(level)
        one_block = y0 % bh == 0 and x0 % bw == 0 and h == min(bh, height - y0) and w == min(bw, width - x0)
        if not one_block:
            return self._decode(level, y0, x0, h, w)
        key = (level, y0, x0)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        block = self._decode(level, y0, x0, h, w)
        with self._lock:
            self._kept[key] = block
            total = sum(b.nbytes for b in self._kept.values())
            while total > self._kept_bytes and self._kept:
                total -= self._kept.popitem(last=False)[1].nbytes
        return block

    def fingerprint(self) -> str:
        """Return the hash kept with a pyramid of stfm, else one of shape and coarsest level."""
        if self._fingerprint is None:
            coarsest = len(self._arrays) - 1
            h, w = self.level_shape(coarsest)
            middle = self._decode(coarsest, h // 4, w // 4, min(h - h // 4, 4096), min(w - w // 4, 4096))
            digest = hashlib.sha256(repr([a.shape for a in self._arrays]).encode())
            digest.update(np.ascontiguousarray(middle).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _plane(self, shape: tuple[int, ...], level: int) -> tuple[int, int]:
        h, w = shape[-3:-1] if self._last[level] else shape[-2:]
        return int(h), int(w)

    def _decode(self, level: int, y0: int, x0: int, h: int, w: int) -> NDArray[np.uint8]:
        array = self._arrays[level]
        front = (0,) * (array.ndim - 3)
        rows, cols = slice(y0, y0 + h), slice(x0, x0 + w)
        try:
            if self._last[level]:
                return np.ascontiguousarray(array[(*front, rows, cols, slice(None))])
            return np.ascontiguousarray(np.moveaxis(array[(*front, slice(None), rows, cols)], 0, -1))
        except (OSError, RuntimeError, ValueError) as error:
            msg = f"zarr image {self.name!r}: a block cannot be decoded ({error}); delete the folder and make it again."
            raise DataIntegrityError(msg) from error


def _open_levels(path: Any) -> tuple[list[Any], Mapping[str, Any]]:
    """Return the arrays of an image, finest first, and the attributes of what holds them."""
    import zarr

    node = path
    if not isinstance(path, (zarr.Array, zarr.Group)):
        if not Path(path).exists():
            msg = f"There is no image {str(path)!r}."
            raise InputError(msg)
        try:
            node = zarr.open(str(path), mode="r")
        except (OSError, KeyError, ValueError) as error:
            msg = f"{str(path)!r} cannot be opened as zarr ({error})."
            raise DataIntegrityError(msg) from error
    if isinstance(node, zarr.Array):
        levels = [node]
    else:
        multiscales = _multiscales(node.attrs)
        if multiscales:
            keys = [d["path"] for d in multiscales["datasets"]]
        else:
            keys = sorted(k for k in node.array_keys() if k.isdigit())
        levels = [node[k] for k in keys if k in node]
        if not levels or len(levels) != len(keys):
            msg = f"zarr group {str(path)!r} has no image: expected arrays '0', '1', ... or OME-Zarr metadata."
            raise DataIntegrityError(msg)
    if any(a.ndim < 3 or any(n != 1 for n in a.shape[:-3]) for a in levels):
        shape = levels[0].shape
        msg = f"zarr image {str(path)!r} has shape {shape}; expected (height, width, 3) or (3, height, width)."
        raise InputError(msg)
    return levels, dict(node.attrs)


def _multiscales(attrs: Mapping[str, Any]) -> dict[str, Any] | None:
    found = attrs.get("multiscales") or attrs.get("ome", {}).get("multiscales")
    return dict(found[0]) if found else None


def _ome_mpp(attrs: Mapping[str, Any]) -> float | None:
    """Return µm per px of OME-Zarr metadata, where axes are in µm."""
    multiscales = _multiscales(attrs)
    if multiscales is None:
        return None
    units = [axis.get("unit") if isinstance(axis, dict) else None for axis in multiscales.get("axes", [])]
    for transform in multiscales["datasets"][0].get("coordinateTransformations", []):
        if transform.get("type") == "scale" and units and units[-1] == "micrometer":
            return float(transform["scale"][-1])
    return None


def write_pyramid(
    target: Path,
    bands: Iterable[NDArray[np.uint8]],
    shape: tuple[int, int],
    *,
    fingerprint: str,
    mpp: float | None = None,
) -> None:
    """Write an image as a tiled pyramid, whole or not at all.

    Parameters
    ----------
    target
        Folder to make; left as it is where it exists by the time everything is written.
    bands
        The image from top to bottom in bands of ``BLOCK_PX`` rows (the last may be lower), uint8 ``(rows, width, 3)``.
    shape
        Height and width.
    fingerprint, mpp
        Kept in the attributes.
    """
    import zarr

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        group = zarr.open_group(str(scratch), mode="w")
        half = np.empty(((shape[0] + 1) // 2, (shape[1] + 1) // 2, 3), np.uint8)
        finest = _level(group, 0, shape)
        row = 0
        for band in bands:
            finest[row : row + len(band)] = band
            half[row // 2 : (row + len(band) + 1) // 2] = halve(band)
            row += len(band)
        level = 1
        while max(half.shape[:2]) >= _COARSEST_PX and min(half.shape[:2]) > 1:
            _level(group, level, (half.shape[0], half.shape[1]))[:] = half
            half = halve(half)
            level += 1
        group.attrs["stfm"] = {"fingerprint": fingerprint, "mpp": mpp, "n_levels": level}
        try:
            scratch.replace(target)
        except OSError:
            if not target.exists():  # else another process was faster, and wrote the same
                raise
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)


def _level(group: Any, level: int, shape: tuple[int, int]) -> Any:
    from zarr.codecs import BloscCodec, Crc32cCodec

    return group.create_array(
        str(level),
        shape=(*shape, 3),
        chunks=(min(BLOCK_PX, shape[0]), min(BLOCK_PX, shape[1]), 3),
        dtype="uint8",
        # lz4 does not notice damaged bytes, so that each block carries a checksum
        compressors=(BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle", typesize=1), Crc32cCodec()),
    )


def writable(folder: Path) -> bool:
    """Return whether a folder, or the nearest one above it that exists, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)
