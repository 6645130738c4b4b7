"""What is known about an encoder before it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stfm._validate import check_choice

if TYPE_CHECKING:
    from collections.abc import Mapping

MODALITIES = ("image", "gene")
MODES = ("full", "frozen", "lora")
SOURCES = ("scratch", "published", "fitted", "formula")


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the table of encoders.

    Parameters
    ----------
    name
        Name in the registry.
    modality
        ``"image"`` or ``"gene"``.
    factory
        ``"module:function"`` that builds it; called with the spec and the options (gene encoders: and ``n_genes``).
    width
        Width of the vector it returns, with the options below.
    source
        Where its weights come from: ``"scratch"`` (trained with the model), ``"published"`` (a checkpoint of others,
        brought by the user), ``"fitted"`` (computed from the training slides), ``"formula"`` (no weights).
    mode
        How it is used unless asked otherwise: ``"full"`` (trained), ``"frozen"`` or ``"lora"``.
    parameters
        Number of parameters; None where it depends on the number of genes.
    input_px
        Side of the tile that the encoder reads, px; other sizes are resized. None: any size is taken as it is.
    mpp
        µm/px that its publisher states, if any.
    mean, std
        Channel statistics that its input is normalised with (of values in 0..1).
    interpolation
        How other sizes are resized, ``"bilinear"`` or ``"bicubic"``.
    licence, gated, citation, description
        Of the published weights; what the encoder is.
    options
        Arguments of the factory that this row fixes; users may override them.
    """

    name: str
    modality: str
    factory: str
    width: int
    source: str = "scratch"
    mode: str = "full"
    parameters: int | None = None
    input_px: int | None = None
    mpp: float | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    licence: str = ""
    gated: bool = False
    citation: str = ""
    description: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("modality", self.modality, MODALITIES)
        check_choice("mode", self.mode, MODES)
        check_choice("source", self.source, SOURCES)
