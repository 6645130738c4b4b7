"""Changes of tiles and counts during training, for a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stfm.nn.batch import Batch
    from stfm.slide.slide import Slide
    from stfm.training.recipes import Recipe

_Change: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

__all__ = ["augment", "crop", "drop_genes", "jitter_stain", "thin_counts", "turn"]

#: Optical density (RGB) of haematoxylin, eosin and a residual, of Ruifrok & Johnston (2001), rows of unit length.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_N_TURNS = 8


def turn(tiles: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Turn and mirror each tile: ``which`` in 0..7 names one of the eight symmetries of a square.

    Parameters
    ----------
    tiles
        ``(b, 3, s, s)``.
    which
        int64 ``(b,)``: quarter turns (``which % 4``), then mirrored where ``which >= 4``.

    Returns
    -------
    Tensor like ``tiles``.
    """
    out = torch.empty_like(tiles)
    for k in range(_N_TURNS):
        rows = torch.nonzero(which == k).squeeze(1)
        if len(rows):
            turned = torch.rot90(tiles[rows], k % 4, dims=(2, 3))
            out[rows] = turned.flip(3) if k >= _N_TURNS // 2 else turned
    return out


def jitter_stain(tiles: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale the stains of each tile in optical density (Beer-Lambert).

    Parameters
    ----------
    tiles
        uint8 ``(b, 3, h, w)``.
    scale
        float ``(b, 3)``: factor of haematoxylin, eosin and residual; 1 changes nothing.

    Returns
    -------
    uint8 tensor like ``tiles``; white stays white.
    """
    unit = _STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)
    stains = torch.as_tensor(unit, dtype=torch.float32)
    # density (row vector) -> stains -> scaled -> density, as one 3 x 3 matrix a tile
    change = torch.linalg.inv(stains) @ (scale.float()[:, :, None] * stains)
    table = -torch.log((torch.arange(256, dtype=torch.float32) + 1) / 256)
    density = table[tiles.long()].flatten(2)
    light = torch.exp(-(change.transpose(1, 2) @ density)) * 256 - 1
    return light.round_().clamp_(0, 255).to(torch.uint8).view_as(tiles)


def crop(tiles: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Cut a square out of each tile and show it at the tile's size (bilinear).

    Parameters
    ----------
    tiles
        uint8 ``(b, 3, s, s)``.
    box
        float ``(b, 3)``: side of the square as a share of the tile's, and its middle in x and y, from -1 to 1 of the
        room that is left; (1, 0, 0) changes nothing.

    Returns
    -------
    uint8 tensor like ``tiles``.
    """
    side = box[:, 0].float()
    theta = torch.zeros(len(box), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = box[:, 1:].float() * (1 - side)[:, None]
    grid = F.affine_grid(theta, list(tiles.shape), align_corners=False)
    shown = F.grid_sample(tiles.float(), grid, padding_mode="border", align_corners=False)
    return shown.round_().clamp_(0, 255).to(torch.uint8)


def drop_genes(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """Set a share of the genes to zero, the same ones in the spot's and the niche's counts."""
    counts = batch.counts if batch.counts is not None else batch.niche_counts
    if counts is None or share == 0:
        return batch
    keep = torch.from_numpy((rng.random(counts.shape[1]) >= share).astype(np.float32))
    changed = {
        name: tensor * keep for name in ("counts", "niche_counts") if (tensor := getattr(batch, name)) is not None
    }
    return replace(batch, **changed)


def augment(batch: Batch, recipe: Recipe, rng: np.random.Generator) -> Batch:
    """Return a batch with turned and cut tiles, other stains and fewer genes, as the recipe says."""
    names = ("spot_tiles",) if recipe.changed == "spot" else ("spot_tiles", "niche_tiles")
    tiles = {name: t for name in names if (t := getattr(batch, name)) is not None}
    for change, amount in _draw(recipe, batch.n_rows, rng) if tiles else ():
        tiles = {name: _each(change, t, amount) for name, t in tiles.items()}
        batch = replace(batch, **tiles)
    return drop_genes(batch, recipe.gene_dropout, rng)


def _draw(recipe: Recipe, size: int, rng: np.random.Generator) -> Iterator[tuple[_Change, torch.Tensor]]:
    """Yield what is done to tiles, with how much of it for each spot."""
    if recipe.flips:
        yield turn, torch.from_numpy(rng.integers(0, _N_TURNS, size))
    if recipe.crop > 0:
        side = rng.uniform(1 - recipe.crop, 1, (size, 1))
        yield crop, torch.from_numpy(np.concatenate([side, rng.uniform(-1, 1, (size, 2))], axis=1))
    if recipe.stain_jitter > 0:
        yield jitter_stain, torch.from_numpy(rng.uniform(1 - recipe.stain_jitter, 1 + recipe.stain_jitter, (size, 3)))


def _each(change: _Change, tiles: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Change all tiles of a spot alike, be it one ``(b, 3, h, w)`` or several ``(b, c, 3, h, w)``."""
    if tiles.ndim == 4:
        return change(tiles, amount)
    return change(tiles.flatten(0, 1), amount.repeat_interleave(tiles.shape[1], dim=0)).view_as(tiles)


def thin_counts(slide: Slide, share: float, rng: np.random.Generator) -> Slide:
    """Return the slide with up to ``share`` of its counts dropped at random, as if sequenced less deeply.

    Binomial thinning of Poisson counts gives Poisson counts, so the result could have been measured.
    """
    from stfm.slide.counts import Counts

    if slide.counts is None or share == 0:
        return slide
    matrix = slide.counts.to_csr().copy()
    kept = 1 - rng.uniform(0, share)
    matrix.data = rng.binomial(matrix.data.astype(np.int64), kept).astype(np.float32)
    return replace(slide, counts=Counts(matrix))
