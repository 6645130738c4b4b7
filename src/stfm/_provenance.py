"""The record that stfm leaves beside every result: enough to make it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping


def plain(value: Any) -> Any:
    """Return a value as plain Python that AnnData can write to disk (``None`` becomes ``"none"``)."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(v) for v in value]
        same = len({type(v) for v in items}) <= 1 and not any(isinstance(v, (dict, list, np.ndarray)) for v in items)
        # h5ad has arrays but no lists; a list of mixed things is kept as strings.
        return np.asarray(items if same else [str(v) for v in items])
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (str, bool, int, float, np.ndarray)):
        return value
    return str(value)


def record(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``params`` as plain values, with the version of stfm that made the result."""
    from stfm._version import __version__

    return {"stfm_version": __version__, **{str(k): plain(v) for k, v in params.items()}}
