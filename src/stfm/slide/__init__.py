"""One slide as a model sees it, and the ways in: AnnData, files, lists of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.slide.read import as_slides
    from stfm.slide.slide import Slide

__all__ = ["Slide", "as_slides"]

__getattr__, __dir__, _ = _lazy.attach(__name__, {"Slide": "slide", "as_slides": "read"})
