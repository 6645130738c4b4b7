"""Tiles at the µm/px that an encoder was trained at: resampled or refused, never fed silently."""

from __future__ import annotations

from math import ceil, isfinite
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from stfm._errors import InputError
from stfm._validate import check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from stfm.encoders.spec import EncoderSpec

__all__ = ["ON_MPP", "TOLERANCE", "fit_scale", "resize"]

#: what is done with a tile at another µm/px than the encoder's
ON_MPP = ("resample", "error", "ignore")
#: a scale this near counts as the same: UNI is used on 256 px at 0.5 µm/px shown at 224, which is 0.57
TOLERANCE = 0.25
#: more views of one tile than this are refused
MAX_VIEWS = 64


def fit_scale(
    tiles: Tensor, spec: EncoderSpec, mpp: float | None = None, *, on_mpp: str = "resample"
) -> tuple[Tensor, int]:
    """Bring tiles to the input of an encoder.

    A tile whose µm/px, once it has the encoder's size, lies within 25 % of what the encoder states (or of which one of
    the two is not known) is resized. One at another scale is brought to the encoder's µm/px: where it is then larger
    than the encoder's input, it is covered with overlapping views, whose features the encoder averages; where it is
    smaller, it lies in the middle of white.

    Parameters
    ----------
    tiles
        Float in 0..1, ``(b, 3, h, w)``.
    spec
        Says input size and µm/px.
    mpp
        µm/px of the tiles as they come; None where it is not known.
    on_mpp
        ``"resample"`` as above, ``"error"`` refuses tiles at another scale, ``"ignore"`` resizes them all the same.

    Returns
    -------
    Tensor ``(b v, 3, s, s)`` and v, the number of views of a tile, which lie one after the other.

    Raises
    ------
    InputError
        A scale that is no positive number, another one with ``"error"``, or a tile so large that it would take more
        than 64 views.
    """
    check_choice("on_mpp", on_mpp, ON_MPP)
    shown = spec.resize_px or spec.input_px
    if mpp is None or spec.mpp is None or on_mpp == "ignore":
        return _usual(tiles, spec), 1
    if not (isfinite(mpp) and mpp > 0):
        msg = f"mpp must be a positive number of µm/px, or None where it is not known; got {mpp}."
        raise InputError(msg)
    height, width = tiles.shape[-2:]
    seen = mpp if shown is None else mpp * max(height, width) / shown
    if 1 / (1 + TOLERANCE) <= seen / spec.mpp <= 1 + TOLERANCE:
        return _usual(tiles, spec), 1
    if on_mpp == "error":
        msg = (
            f"Encoder {spec.name!r} was trained at {spec.mpp:g} µm/px and would see these tiles at {seen:.3g} µm/px. "
            f"Ask for tiles of {spec.mpp * (shown or max(height, width)):g} µm, or set on_mpp='resample'."
        )
        raise InputError(msg)
    size = tuple(max(1, round(side * mpp / spec.mpp)) for side in (height, width))
    x = resize(tiles, (size[0], size[1]), spec.interpolation)
    return (x, 1) if spec.input_px is None else _views(x, spec.input_px, spec)


def resize(tiles: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Return tiles of another size, antialiased and within 0..1."""
    if tiles.shape[-2:] == size:
        return tiles
    out = F.interpolate(tiles, size=size, mode=interpolation, align_corners=False, antialias=True)
    return out.clamp(0.0, 1.0)


def _usual(tiles: Tensor, spec: EncoderSpec) -> Tensor:
    """Resize, then cut out the middle where the publisher does so."""
    if spec.input_px is None:
        return tiles
    shown = spec.resize_px or spec.input_px
    x = resize(tiles, (shown, shown), spec.interpolation)
    start = (shown - spec.input_px) // 2
    return x[..., start : start + spec.input_px, start : start + spec.input_px]


def _views(tiles: Tensor, side: int, spec: EncoderSpec) -> tuple[Tensor, int]:
    """Cover tiles with views of one size."""
    missing = [max(0, side - length) for length in tiles.shape[-2:]]
    top, left = missing[0] // 2, missing[1] // 2
    x = F.pad(tiles, (left, missing[1] - left, top, missing[0] - top), value=1.0)
    rows, columns = (_starts(length, side) for length in x.shape[-2:])
    n = len(rows) * len(columns)
    if n > MAX_VIEWS:
        msg = (
            f"A tile of {tiles.shape[-1]} px at the {spec.mpp:g} µm/px of encoder {spec.name!r} would take {n} views "
            f"of {side} px (at most {MAX_VIEWS}); ask for smaller tiles, or set on_mpp='ignore'."
        )
        raise InputError(msg)
    views = [x[..., row : row + side, column : column + side] for row in rows for column in columns]
    return torch.stack(views, dim=1).flatten(0, 1), n


def _starts(length: int, side: int) -> list[int]:
    """Return where views start so that they cover a length evenly."""
    n = ceil(length / side)
    return [0] if n == 1 else [round(i * (length - side) / (n - 1)) for i in range(n)]
