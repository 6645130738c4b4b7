"""Published weights: a table of names, fetched into the user's cache, verified, resumed; or packaged in the wheel."""

from __future__ import annotations

from stfm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    {
        "WEIGHTS": "registry",
        "WeightsSpec": "registry",
        "fetch": "_fetch",
        "list_weights": "_fetch",
        "locate": "_fetch",
        "path": "_fetch",
        "read_state": "state",
        "verify": "_fetch",
    },
)
