"""Image and gene encoders: rows of a table, one adapter a family. ``list_encoders()`` shows them."""

from __future__ import annotations

from stfm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    {
        "ENCODERS": "registry",
        "Encoder": "base",
        "EncoderSpec": "spec",
        "GeneEncoder": "base",
        "ImageEncoder": "base",
        "KeyMap": "keymap",
        "build_encoder": "build",
        "fit_scale": "scale",
        "list_encoders": "registry",
    },
)
