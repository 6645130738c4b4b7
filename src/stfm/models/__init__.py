"""Models of spots: made by name, saved to a folder, loaded back bit for bit."""

from __future__ import annotations

from stfm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    {
        "About": "_card",
        "ContrastiveConfig": "contrastive",
        "Embedding": "base",
        "EncoderChoice": "_slots",
        "InputSpec": "inputs",
        "Model": "base",
        "STAlignConfig": "st_align_config",
        "StormMultiBranchConfig": "storm_multibranch_config",
        "create": "registry",
        "list_encoders": "registry",
        "list_models": "registry",
        "load": "registry",
    },
)
