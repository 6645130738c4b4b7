"""Plots: Axes in, Axes out; nothing is shown, saved or configured behind the user's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.pl._attribution import attribution
    from stfm.pl._calibration import calibration
    from stfm.pl._domains import spatial_domains
    from stfm.pl._embedding import embedding
    from stfm.pl._expression import predicted_expression
    from stfm.pl._niches import niches
    from stfm.pl._tiles import tiles
    from stfm.pl._training import training

__all__ = [
    "attribution",
    "calibration",
    "embedding",
    "niches",
    "predicted_expression",
    "spatial_domains",
    "tiles",
    "training",
]

__getattr__, __dir__, _ = _lazy.attach(
    __name__,
    {
        "attribution": "_attribution",
        "calibration": "_calibration",
        "embedding": "_embedding",
        "niches": "_niches",
        "predicted_expression": "_expression",
        "spatial_domains": "_domains",
        "tiles": "_tiles",
        "training": "_training",
    },
)
