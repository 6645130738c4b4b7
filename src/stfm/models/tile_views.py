"""Self-supervision of an image tower: one place at two scales, changed apart, ends in one vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, check_range
from stfm.models._slots import EncoderChoice, as_choice, build_image, check_batch
from stfm.models.base import Embedding, Model
from stfm.models.inputs import InputSpec
from stfm.nn.vicreg import vicreg_terms

if TYPE_CHECKING:
    from stfm._registry import Registry
    from stfm.models.registry import ModelSpec
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "small": {"image": EncoderChoice("resnet-small", options={"stem": "imagenet"}), "tile_px": 56, "width": 128},
}


@dataclass(frozen=True)
class TileViewsConfig:
    """Configuration of the self-supervision of tiles.

    Parameters
    ----------
    image
        Encoder that learns, by name or :class:`EncoderChoice`; it may not be frozen.
    tile_px
        Side of both tiles in px.
    sizes_um
        Sides in µm of the two tiles around a place.
    width
        Width of the vectors that are compared.
    invariance, variance, covariance
        Weights of the terms (25, 25, 1 as published).
    """

    image: EncoderChoice = field(default_factory=lambda: EncoderChoice("mobilenetv2", mode="full"))
    tile_px: int = 112
    sizes_um: tuple[float, float] = (112.0, 224.0)
    width: int = 512
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def __post_init__(self) -> None:
        choice = as_choice("image", self.image, "image")
        if choice is None or choice.used_as == "frozen":
            msg = "tile-views trains an image encoder: give one in slot 'image' with mode='full' or 'lora'."
            raise InputError(msg)
        object.__setattr__(self, "image", choice)
        object.__setattr__(self, "sizes_um", tuple(float(size) for size in self.sizes_um))
        if len(self.sizes_um) != 2:
            msg = f"sizes_um must be two sides in µm, got {self.sizes_um}."
            raise InputError(msg)
        for size in self.sizes_um:
            check_positive("sizes_um", size)
        for name in ("tile_px", "width"):
            check_count(name, getattr(self, name))
        for name in ("invariance", "variance", "covariance"):
            check_range(name, getattr(self, name), 0.0, float("inf"))

    @classmethod
    def preset(cls, name: str = "recommended") -> TileViewsConfig:
        """Return a configuration by name: ``"recommended"`` (MobileNetV2) or ``"small"`` (trains from scratch)."""
        check_choice("preset", name, PRESETS)
        return cls(**PRESETS[name])


class TileViews(Model):
    """Image tower that learns from H&E alone.

    The tile of a place and the larger one around it are turned, cropped and stained anew, each by itself (recipe
    ``tile-views``), and their vectors are brought together by VICReg. What is left in the features is what the two have
    in common: tissue, not stain or orientation. The trained encoder stands in slots of other models
    (``model.image.backbone.state_dict()``).

    Parameters
    ----------
    config
        See :class:`TileViewsConfig`.
    vocabulary
        None; the model reads no genes.
    pretrained
        Read the checkpoint that the encoder choice names.

    References
    ----------
    Bardes, Ponce and LeCun 2022, arXiv:2105.04906.
    """

    family: ClassVar[str] = "tile-views"
    config_class: ClassVar[type[Any]] = TileViewsConfig
    reads_genes: ClassVar[bool] = False
    config: TileViewsConfig

    def __init__(
        self, config: TileViewsConfig, vocabulary: Vocabulary | None = None, *, pretrained: bool = True
    ) -> None:
        super().__init__(config, None, pretrained=pretrained)
        self.image = build_image(config.image, pretrained=pretrained)
        self.projector = nn.Sequential(
            nn.LayerNorm(self.image.width),
            nn.Linear(self.image.width, config.width),
            nn.BatchNorm1d(config.width),
            nn.ReLU(),
            nn.Linear(config.width, config.width),
        )

    @property
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot: two tiles."""
        px, (small, large) = self.config.tile_px, self.config.sizes_um
        return InputSpec(
            spot_px=px, niche_px=px, spot_um=small, niche_um=large, counts=False, niche_counts=False, min_fraction=0.0
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"`` and the terms of VICReg.

        Raises
        ------
        InputError
            The batch has no H&E, or one spot in training.
        """
        check_batch(batch, training=self.training)
        if batch.spot_tiles is None or batch.niche_tiles is None:
            msg = "The batch has no H&E; tile-views learns from tiles alone."
            raise InputError(msg)
        first, second = (self.projector(self.image(tiles)) for tiles in (batch.spot_tiles, batch.niche_tiles))
        terms = vicreg_terms(first.float(), second.float())
        config = self.config
        loss = (
            config.invariance * terms.invariance
            + config.variance * terms.variance
            + config.covariance * terms.covariance
        )
        return {
            "loss": loss,
            "invariance": terms.invariance,
            "variance": terms.variance,
            "covariance": terms.covariance,
        }

    def embed(self, batch: Batch) -> Embedding:
        """Return the features of the smaller tile (``joint``, ``image``) and of the larger one (``niche``)."""
        if batch.spot_tiles is None or batch.niche_tiles is None:
            msg = "The batch has no H&E; tile-views embeds tiles alone."
            raise InputError(msg)
        spot, niche = (F.normalize(self.image(tiles), dim=-1) for tiles in (batch.spot_tiles, batch.niche_tiles))
        return Embedding(joint=spot, image=spot, niche=niche)


def register(models: Registry[ModelSpec]) -> None:
    """Add the sizes to the registry."""
    from stfm.models.registry import register_presets

    rows = {
        "recommended": ("tile-views", "self-supervision of an image tower (MobileNetV2) on H&E alone"),
        "small": ("tile-views-small", "the same for a small residual network at 56 px, from scratch"),
    }
    register_presets(models, TileViews, rows, reference="arXiv:2105.04906")
