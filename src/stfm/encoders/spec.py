"""What is known about an encoder before it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive

if TYPE_CHECKING:
    from collections.abc import Mapping

MODALITIES = ("image", "gene")
MODES = ("full", "frozen", "lora")
SOURCES = ("scratch", "published", "fitted", "formula")
INTERPOLATIONS = ("bilinear", "bicubic")
#: fields that say how an image is prepared; options of ``build_encoder`` may change them
INPUT_FIELDS = ("input_px", "resize_px", "mpp", "mean", "std", "interpolation", "pooling")
TUPLES = ("mean", "std")


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
    resize_px
        Side that tiles are resized to before the middle of ``input_px`` is cut out; None: ``input_px``.
    mpp
        µm/px that it was trained at, where that is public.
    mean, std
        Channel statistics that its input is normalised with (of values in 0..1).
    interpolation
        How other sizes are resized, ``"bilinear"`` or ``"bicubic"``.
    pooling
        How one vector is taken from it unless asked otherwise, one of ``POOLINGS`` of
        ``stfm.encoders.image.pooling``.
    licence, gated, citation, description
        Of the published weights; what the encoder is.
    hub, file
        Repository on the Hugging Face hub and the file in it (or the file's usual name).
    certainty, notes
        How sure the layout and the preprocessing are; what to look out for.
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
    resize_px: int | None = None
    mpp: float | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    pooling: str = ""
    licence: str = ""
    gated: bool = False
    citation: str = ""
    description: str = ""
    hub: str = ""
    file: str = ""
    certainty: str = ""
    notes: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("modality", self.modality, MODALITIES)
        check_choice("mode", self.mode, MODES)
        check_choice("source", self.source, SOURCES)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        for name in TUPLES:
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                msg = f"Encoder {self.name!r}: {name} must be 3 {'positive ' * (name == 'std')}numbers, got {values}."
                raise InputError(msg)
            object.__setattr__(self, name, values)
        for name, check in (("input_px", check_count), ("resize_px", check_count), ("mpp", check_positive)):
            if getattr(self, name) is not None:
                check(f"Encoder {self.name!r}: {name}", getattr(self, name))
        if self.input_px is not None and self.resize_px is not None:
            check_count(f"Encoder {self.name!r}: resize_px", self.resize_px, minimum=self.input_px)

    @property
    def remote(self) -> str:
        """Where its weights are on the Hugging Face hub, as ``weights=`` takes it; "" where that is not known."""
        return f"hub:{self.hub}/{self.file}" if self.hub and self.file else ""

    def seen(self) -> dict[str, Any]:
        """Return what decides the features: architecture and preprocessing, not the words about it."""
        return {name: getattr(self, name) for name in ("name", "factory", *INPUT_FIELDS)} | {"options": self.options}
