"""Images and grids of bins cut into the patches of a Transformer, and put together again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stfm._errors import InputError

__all__ = ["patchify", "reorder_legacy", "share_on_own_token", "unpatchify"]


def patchify(image: Tensor, size: int) -> Tensor:
    """Cut an image into square patches.

    Parameters
    ----------
    image
        ``(b, h, w, c)``, channels last.
    size
        Side of a patch; h and w are multiples of it.

    Returns
    -------
    ``(b, n, size * size * c)``: patches row by row, and in each its cells row by row with their channels.
    """
    b, h, w, c = image.shape
    if h % size or w % size:
        msg = f"an image of {h} x {w} cannot be cut into patches of {size}."
        raise InputError(msg)
    cut = image.reshape(b, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(b, -1, size * size * c)


def unpatchify(tokens: Tensor, size: int, *, legacy_reshape: bool = False) -> Tensor:
    """Put a square image together from its patches, every cell where its patch lies (pixel shuffle).

    Parameters
    ----------
    tokens
        ``(b, n, size * size * c)`` as :func:`patchify` returns them; n is a square number.
    size
        Side of a patch.
    legacy_reshape
        Read the numbers as they follow each other instead, as the published code of SQUALL does: a patch then becomes a
        strip of cells, and only one cell in ``sqrt(n)`` lies on its own patch. For weights that were trained so.

    Returns
    -------
    ``(b, h, w, c)``.
    """
    b, n, length = tokens.shape
    side = math.isqrt(n)
    if side * side != n or length % (size * size):
        msg = f"{n} tokens of length {length} make no square image of patches of {size} x {size} cells."
        raise InputError(msg)
    if legacy_reshape:
        return tokens.reshape(b, side * size, side * size, -1)
    cells = tokens.reshape(b, side, side, size, size, -1).permute(0, 1, 3, 2, 4, 5)
    return cells.reshape(b, side * size, side * size, -1)


def reorder_legacy(tokens: Tensor, size: int) -> Tensor:
    """Return the tokens whose proper un-patchify is the legacy one of ``tokens``."""
    return patchify(unpatchify(tokens, size, legacy_reshape=True), size)


def share_on_own_token(side: int, size: int, *, legacy_reshape: bool = False) -> float:
    """Return the share of cells that un-patchify puts on the patch of the token that made them.

    Parameters
    ----------
    side
        Patches along a side of the image.
    size
        Cells along a side of a patch.
    legacy_reshape
        As in :func:`unpatchify`: 1 / 14 for 14 x 14 patches, against 1 otherwise.
    """
    number = torch.arange(side * side).view(1, -1, 1).expand(1, -1, size * size)
    placed = patchify(unpatchify(number.contiguous(), size, legacy_reshape=legacy_reshape), size)
    return float((placed == number).double().mean())
