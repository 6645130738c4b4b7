"""Preprocessing: what a model needs to know of a slide, written where the rest of stfm finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.pp._genes import match_genes
    from stfm.pp._niches import build_niches
    from stfm.pp._tiles import tile

__all__ = ["build_niches", "match_genes", "tile"]

__getattr__, __dir__, _ = _lazy.attach(__name__, {"build_niches": "_niches", "match_genes": "_genes", "tile": "_tiles"})
