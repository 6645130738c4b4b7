"""Multimodal foundation models of spatial transcriptomics behind ``pp``, ``tl`` and ``pl``.

Every name below is loaded on first use (PEP 562), so that ``import stfm`` costs a few milliseconds and loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy
from stfm._version import __version__

if TYPE_CHECKING:
    from stfm import datasets, encoders, errors, get, metrics, models, pl, pp, slide, tl, weights
    from stfm._settings import settings

__all__ = [
    "__version__",
    "datasets",
    "encoders",
    "errors",
    "get",
    "metrics",
    "models",
    "pl",
    "pp",
    "settings",
    "slide",
    "tl",
    "weights",
]

__getattr__, __dir__, _ = _lazy.attach(
    __name__,
    {
        "__version__": "_version",
        "datasets": "",
        "encoders": "",
        "errors": "",
        "get": "",
        "metrics": "",
        "models": "",
        "pl": "",
        "pp": "",
        "settings": "_settings",
        "slide": "",
        "tl": "",
        "weights": "",
    },
)
