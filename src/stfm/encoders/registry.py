"""Registry of encoders, filled from ``encoders.toml`` (rows, not classes)."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from stfm._registry import Registry
from stfm.encoders.spec import EncoderSpec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ENCODERS", "custom_spec", "list_encoders", "timm_spec"]

TIMM = "timm:"
COLUMNS = (
    "modality", "description", "width", "parameters", "input_px", "resize_px", "mpp", "mean", "std", "interpolation",
    "pooling", "source", "mode", "licence", "gated", "hub", "file", "certainty", "notes", "citation",
)  # fmt: skip


def _load() -> None:
    text = files("stfm.encoders").joinpath("encoders.toml").read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        aliases = row.pop("aliases", [])
        ENCODERS.register(name, EncoderSpec(name=name, **row), aliases=aliases)


class EncoderRegistry(Registry[EncoderSpec]):
    """The table, and beside it ``"timm:<model>"`` for any model that timm has."""

    def get(self, name: str) -> EncoderSpec:
        """Return the spec of a name or alias, or of a model of timm."""
        if isinstance(name, str) and name.startswith(TIMM):
            return timm_spec(name)
        return super().get(name)

    def __contains__(self, name: str) -> bool:
        return (isinstance(name, str) and name.startswith(TIMM)) or super().__contains__(name)


def timm_spec(name: str) -> EncoderSpec:
    """Return the spec of ``"timm:<model>"``; what timm knows of the model is filled in when it is built."""
    model = name.removeprefix(TIMM)
    return EncoderSpec(
        name=name,
        modality="image",
        factory="stfm.encoders.image.any:from_timm",
        width=0,
        source="published",
        mode="frozen",
        licence="see the model's card",
        description=f"{model} of timm",
        certainty="timm's own code and preprocessing",
        options={"model": model},
    )


def custom_spec(function: Any) -> EncoderSpec:
    """Return the spec of a callable; its width is found when it is built."""
    named = getattr(function, "__qualname__", type(function).__qualname__)
    return EncoderSpec(
        name=f"callable:{named}",
        modality="image",
        factory="stfm.encoders.image.any:from_callable",
        width=0,
        source="formula",
        mode="frozen",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        description=f"the user's own {named}",
        certainty="the user's own",
    )


ENCODERS: EncoderRegistry = EncoderRegistry("encoder", entry_points_group="stfm.encoders", loader=_load)


def list_encoders(modality: str | None = None) -> pd.DataFrame:
    """Return the table of encoders.

    ``"timm:<model>"`` and callables are encoders, too, and are not listed.

    Parameters
    ----------
    modality
        Only ``"image"`` or ``"gene"`` encoders.

    Returns
    -------
    A row an encoder: what it is, width, parameters, input (px, resized to, µm/px, mean, std, interpolation), pooling,
    licence, whether access to the weights is gated, where they are, how sure all this is, notes, citation.

    Examples
    --------
    >>> import stfm as sf
    >>> table = sf.models.list_encoders("image")
    >>> float(table.loc["ctranspath", "mpp"])
    1.0
    """
    table = ENCODERS.frame()
    table.loc[table["modality"] != "image", ["mean", "std", "interpolation"]] = ""  # which are of images alone
    if modality is not None:
        table = table[table["modality"] == modality]
    return table[list(COLUMNS)].astype({"parameters": "Int64", "input_px": "Int64", "resize_px": "Int64"})
