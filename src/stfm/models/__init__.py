"""Models of spots: made by name, saved to a folder, loaded back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stfm import _lazy

if TYPE_CHECKING:
    from stfm.models.base import Embedding, Model
    from stfm.models.inputs import InputSpec
    from stfm.models.registry import create, list_models, load

__all__ = ["Embedding", "InputSpec", "Model", "create", "list_models", "load"]

__getattr__, __dir__, _ = _lazy.attach(
    __name__,
    {
        "Embedding": "base",
        "InputSpec": "inputs",
        "Model": "base",
        "create": "registry",
        "list_models": "registry",
        "load": "registry",
    },
)
