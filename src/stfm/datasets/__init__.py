"""Data sets: a simulated tissue, and public slides fetched on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.datasets.toy import toy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, {"toy": "toy"})
