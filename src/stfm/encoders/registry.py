"""Registry of encoders, filled from ``encoders.toml`` (rows, not classes)."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import TYPE_CHECKING

from stfm._registry import Registry
from stfm.encoders.spec import EncoderSpec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ENCODERS", "list_encoders"]


def _load() -> None:
    text = files("stfm.encoders").joinpath("encoders.toml").read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        aliases = row.pop("aliases", [])
        for key in ("mean", "std"):
            if key in row:
                row[key] = tuple(row[key])
        ENCODERS.register(name, EncoderSpec(name=name, **row), aliases=aliases)


ENCODERS: Registry[EncoderSpec] = Registry("encoder", entry_points_group="stfm.encoders", loader=_load)


def list_encoders(modality: str | None = None) -> pd.DataFrame:
    """Return the table of encoders.

    Parameters
    ----------
    modality
        Only ``"image"`` or ``"gene"`` encoders.

    Returns
    -------
    A row an encoder: what it is, width, parameters, input size, µm/px, licence.
    """
    table = ENCODERS.frame()
    if modality is not None:
        table = table[table["modality"] == modality]
    table = table[
        [
            "modality",
            "description",
            "width",
            "parameters",
            "input_px",
            "mpp",
            "source",
            "mode",
            "licence",
            "gated",
            "citation",
        ]
    ]
    return table.astype({"parameters": "Int64", "input_px": "Int64"})
