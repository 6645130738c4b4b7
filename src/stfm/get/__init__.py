"""Readers of what ``pp`` and ``tl`` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.get._embedding import embedding
    from stfm.get._niches import niche_table
    from stfm.get._predicted import predicted

__all__ = ["embedding", "niche_table", "predicted"]

__getattr__, __dir__, _ = _lazy.attach(
    __name__, {"embedding": "_embedding", "niche_table": "_niches", "predicted": "_predicted"}
)
