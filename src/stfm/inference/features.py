"""Features of frozen image encoders: computed once a slide, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import torch

from stfm._errors import InputError, StfmWarning
from stfm._logging import get_logger
from stfm._progress import progress
from stfm._settings import settings
from stfm.encoders.base import ImageEncoder
from stfm.inference.device import autocast, evaluating, resolve_device
from stfm.inference.readahead import read_ahead
from stfm.inference.stream import reading_order
from stfm.models.inputs import SideBySide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stfm.models.base import Model
    from stfm.models.inputs import SlideInputs

__all__ = ["encoder_fingerprint", "feature_key", "image_features", "use_frozen_features"]

logger = get_logger("features")

LEVELS = ("spot", "niche")
#: changes when features of the same inputs would come out otherwise
_FORMAT = 1
_AHEAD = 2
#: rows hashed at once
_HASHED = 8192


def use_frozen_features(
    model: Model,
    inputs: Sequence[SlideInputs],
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    cache: bool = True,
) -> None:
    """Let the features of a model's frozen image encoders stand in for tiles, from the disk where they are kept.

    Parameters
    ----------
    model
        Says by :meth:`~stfm.models.base.Model.frozen_image_encoder` which of its encoders are frozen.
    inputs
        Slides made ready for the model; their ``spot_features`` and ``niche_features`` are set.
    batch_size, device, precision, cache
        As of :func:`image_features`.
    """
    for level in LEVELS:
        encoder = model.frozen_image_encoder(level)
        wanted = model.inputs.spot_px if level == "spot" else model.inputs.niche_px
        if encoder is None or wanted is None:
            continue
        fingerprint = encoder_fingerprint(encoder)
        for one in inputs:
            if one.has_image:
                contexts = one.spec.contexts_um if level == "spot" else ()
                shown = [one.showing(size) for size in contexts] or [one]
                tables = [
                    image_features(
                        each, encoder, level, batch_size=batch_size, device=device, precision=precision,
                        cache=cache, fingerprint=fingerprint,
                    )
                    for each in shown
                ]  # fmt: skip
                setattr(one, f"{level}_features", SideBySide(tables) if contexts else tables[0])


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def image_features(
    inputs: SlideInputs,
    encoder: torch.nn.Module,
    level: str,
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    cache: bool = True,
    fingerprint: str | None = None,
) -> NDArray[np.float32]:
    """Return the features of a slide's tiles.

    They are kept under ``settings.cache_dir / "features"`` by the hash of image, tiling, encoder and weights, so that
    another run, or another model with the same encoder, reads them instead.

    Parameters
    ----------
    inputs
        A slide made ready for a model, with an image.
    encoder
        uint8 tiles ``(b, 3, h, w)`` -> ``(b, f)``.
    level
        ``"spot"`` or ``"niche"``.
    batch_size
        Tiles at once.
    device
        See :func:`~stfm.inference.device.resolve_device`.
    precision
        ``"fp32"`` or ``"bf16"``.
    cache
        Whether to read and write the disk.
    fingerprint
        Hash of the encoder, where it is known already.

    Returns
    -------
    float32 ``(n, f)``, spots in their order; read from the disk as they are needed where they are kept there.
    """
    where = resolve_device(device)
    if not cache:
        return _compute(inputs, encoder, level, batch_size, where, precision, _in_memory)
    key = feature_key(inputs, fingerprint or encoder_fingerprint(encoder), level, precision)
    path = settings.cache_dir / "features" / f"{key}.npy"
    kept = _read(path, inputs.n_obs)
    if kept is not None:
        return kept
    if not _is_writable(path.parent):
        msg = f"Features are not kept: {path.parent} cannot be written. Set STFM_CACHE to a folder that can be."
        warnings.warn(msg, StfmWarning, stacklevel=2)
        return _compute(inputs, encoder, level, batch_size, where, precision, _in_memory)
    new = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        features = _compute(inputs, encoder, level, batch_size, where, precision, partial(_on_disk, new))
        _keep(new, path, features)
    finally:
        new.unlink(missing_ok=True)
    return _open(path)


def encoder_fingerprint(encoder: torch.nn.Module) -> str:
    """Return a hash of architecture and weights of an encoder."""
    own = getattr(encoder, "fingerprint", None)
    if callable(own):
        return str(own())
    digest = hashlib.sha256(repr(encoder).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def feature_key(inputs: SlideInputs, fingerprint: str, level: str, precision: str = "fp32") -> str:
    """Return the hash of everything that decides the features: image, where the tiles lie, their size, the encoder."""
    reader = inputs.slide.tiles
    px = inputs.spec.spot_px if level == "spot" else inputs.spec.niche_px
    if reader is None or px is None:
        msg = f"slide {inputs.slide.name!r} or the model has no {level} tiles, so there are no features of them."
        raise InputError(msg)
    coords = np.ascontiguousarray(inputs.slide.coords, dtype=np.float64)
    what = {
        "format": _FORMAT,
        "image": reader.fingerprint(),
        "centres": hashlib.sha256(coords.tobytes()).hexdigest(),
        "mpp": inputs.slide.mpp,
        "tile_um": inputs.tile_um(level),
        "tile_px": px,
        "encoder": fingerprint,
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _in_memory(shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.empty(shape, np.float32)


def _on_disk(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return an array that lives in a file, so that features of millions of spots need no memory."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _open(path: Path) -> NDArray[np.float32]:
    features: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return features


def _compute(
    inputs: SlideInputs,
    encoder: torch.nn.Module,
    level: str,
    batch_size: int,
    device: torch.device,
    precision: str,
    allocate: Callable[[tuple[int, int]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    order = reading_order(inputs)
    result: NDArray[np.float32] | None = None

    def tiles() -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, torch.from_numpy(inputs.tiles(indices, level)).permute(0, 3, 1, 2)

    # Only encoders of stfm take the µm/px of the tiles; they resample or refuse another than their own.
    scale = {"mpp": inputs.tile_mpp(level)[0]} if isinstance(encoder, ImageEncoder) else {}
    with (
        evaluating(encoder, device),
        autocast(device, precision),
        progress(f"Features of {inputs.slide.name}", inputs.n_obs) as advance,
    ):
        for indices, pixels in read_ahead(tiles(), depth=_AHEAD):
            values = encoder(pixels.to(device), **scale).float().cpu().numpy()
            if result is None:
                result = allocate((inputs.n_obs, values.shape[1]))
            result[indices] = values
            advance(len(indices))
    if result is None:
        msg = f"slide {inputs.slide.name!r} has no spots."
        raise InputError(msg)
    return result


def _read(path: Path, n_obs: int) -> NDArray[np.float32] | None:
    """Return kept features, or None where there are none or the file is not what was written."""
    beside = path.with_suffix(".json")
    if not (path.exists() and beside.exists()):
        return None
    try:
        expected = json.loads(beside.read_text(encoding="utf-8"))["sha256"]
        features = _open(path)
        whole = _sha256(features) == expected and len(features) == n_obs
    except (OSError, ValueError, KeyError, EOFError) as error:
        logger.info("%s: %s", path, error)
        whole = False
    if not whole:
        warnings.warn(
            f"{path} is damaged (its hash differs); the features are computed again.", StfmWarning, stacklevel=4
        )
        return None
    logger.info("features of %d tiles read from %s", len(features), path)
    return features


def _keep(new: Path, path: Path, features: NDArray[np.float32]) -> None:
    """Move features to their place with their hash beside them; a file is there whole or not at all."""
    if isinstance(features, np.memmap):
        features.flush()
    beside = path.with_suffix(".json")
    new_beside = new.with_suffix(".json")
    new_beside.write_text(json.dumps({"sha256": _sha256(features), "shape": list(features.shape)}), encoding="utf-8")
    new.replace(path)
    new_beside.replace(beside)


def _sha256(features: NDArray[np.float32]) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(features), _HASHED):
        digest.update(np.ascontiguousarray(features[start : start + _HASHED]).tobytes())
    return digest.hexdigest()
