"""One slide as a model sees it, and the ways in: AnnData, files, lists of them."""

from __future__ import annotations

from stfm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, {"Slide": "slide", "as_slides": "read"})
