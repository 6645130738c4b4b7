"""Tools: train a model, embed spots, find spatial domains, predict expression from H&E."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.tl._attribution import attribute
    from stfm.tl._domains import spatial_domains
    from stfm.tl._embed import embed
    from stfm.tl._expression import fit_expression, predict_expression
    from stfm.tl._impute import impute
    from stfm.tl._train import train

__all__ = ["attribute", "embed", "fit_expression", "impute", "predict_expression", "spatial_domains", "train"]

__getattr__, __dir__, _ = _lazy.attach(
    __name__,
    {
        "attribute": "_attribution",
        "embed": "_embed",
        "fit_expression": "_expression",
        "impute": "_impute",
        "predict_expression": "_expression",
        "spatial_domains": "_domains",
        "train": "_train",
    },
)
