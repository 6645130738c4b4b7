"""Data sets: a simulated tissue, and public slides fetched on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.datasets._catalogue import list_datasets, load
    from stfm.datasets._her2st import her2st
    from stfm.datasets._mob import mob
    from stfm.datasets._toy import toy

__all__ = ["her2st", "list_datasets", "load", "mob", "toy"]

__getattr__, __dir__, _ = _lazy.attach(
    __name__,
    {"her2st": "_her2st", "list_datasets": "_catalogue", "load": "_catalogue", "mob": "_mob", "toy": "_toy"},
)
