"""An image tower trained further on H&E alone: changed, coarser tiles have to look like what they came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stfm._errors import InputError
from stfm._validate import check_choice, check_count
from stfm.models._slots import EncoderChoice, as_choice, build_image, check_batch
from stfm.models.base import Embedding, Model
from stfm.models.inputs import InputSpec

if TYPE_CHECKING:
    from stfm._registry import Registry
    from stfm.models.registry import ModelSpec
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "tiny": {"image": EncoderChoice("cnn-tiny"), "tile_px": 28, "teacher_px": 56},
}
_FLAT = 1e-4


@dataclass(frozen=True)
class DistillationConfig:
    """Configuration of the training of a tower on H&E alone.

    Parameters
    ----------
    image
        Encoder that learns, by name or :class:`EncoderChoice`; it may not be frozen. Its weights at the start are the
        teacher's.
    tile_px, teacher_px
        Side in px at which the encoder and its teacher see a tile.
    """

    image: EncoderChoice = field(default_factory=lambda: EncoderChoice("mobilenetv2", mode="full"))
    tile_px: int = 112
    teacher_px: int = 224

    def __post_init__(self) -> None:
        choice = as_choice("image", self.image, "image")
        if choice is None or choice.used_as == "frozen":
            msg = "distillation trains an image encoder: give one in slot 'image' with mode='full' or 'lora'."
            raise InputError(msg)
        object.__setattr__(self, "image", choice)
        for name in ("tile_px", "teacher_px"):
            check_count(name, getattr(self, name))

    @classmethod
    def preset(cls, name: str = "recommended") -> DistillationConfig:
        """Return a configuration by name: ``"recommended"`` (MobileNetV2), or ``"tiny"`` for tests."""
        check_choice("preset", name, PRESETS)
        return cls(**PRESETS[name])


class Distillation(Model):
    """Image tower that is taught by its own start.

    The teacher sees a tile as it is and in detail; the encoder sees it turned, stained anew and with fewer px (recipe
    ``"distil"``), and has to give the teacher's features, each in units of its spread over the batch. It unlearns what
    depends on stain and orientation and keeps the rest, in a quarter of the px. The side of a tile in µm is the slide's
    own (``Slide.spot_um`` and ``niche_um``), so that slides may be shown at several scales.

    Parameters
    ----------
    config
        See :class:`DistillationConfig`.
    vocabulary
        None; the model reads no genes.
    pretrained
        Read the checkpoint that the encoder choice names.
    """

    family: ClassVar[str] = "distillation"
    config_class: ClassVar[type[Any]] = DistillationConfig
    reads_genes: ClassVar[bool] = False
    config: DistillationConfig

    def __init__(
        self, config: DistillationConfig, vocabulary: Vocabulary | None = None, *, pretrained: bool = True
    ) -> None:
        super().__init__(config, None, pretrained=pretrained)
        self.image = build_image(config.image, pretrained=pretrained)
        self.teacher = build_image(replace(config.image, mode="frozen", weights=None), pretrained=False)
        self.teacher.backbone.load_state_dict(self.image.backbone.state_dict(), strict=False)
        for encoder in (self.image, self.teacher):
            for parameter in encoder.parameters():
                if parameter.ndim == 4:  # convolutions on CPUs and tensor cores are faster by half so
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @property
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot: one tile, at two sizes in px."""
        return InputSpec(
            spot_px=self.config.tile_px,
            niche_px=self.config.teacher_px,
            counts=False,
            niche_counts=False,
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"``: the mean squared difference of the features, in units of their spread.

        Raises
        ------
        InputError
            The batch has no H&E, or one spot in training.
        """
        check_batch(batch, training=self.training)
        tiles, shown = _tiles(batch)
        with torch.no_grad():
            goal = self.teacher(shown).float()
            mean, spread = goal.mean(dim=0), goal.std(dim=0)
            scale = torch.where(spread > _FLAT * mean.abs().clamp_min(1.0), 1 / spread, 0.0)
        return {"loss": F.mse_loss(scale * (self.image(tiles).float() - mean), scale * (goal - mean))}

    def embed(self, batch: Batch) -> Embedding:
        """Return the features of the tile as the encoder sees it."""
        features = F.normalize(self.image(_tiles(batch)[0]), dim=-1)
        return Embedding(joint=features, image=features)


def _tiles(batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.spot_tiles is None or batch.niche_tiles is None:
        msg = "The batch has no H&E; distillation reads tiles alone."
        raise InputError(msg)
    small, large = (t.contiguous(memory_format=torch.channels_last) for t in (batch.spot_tiles, batch.niche_tiles))
    return small, large


def register(models: Registry[ModelSpec]) -> None:
    """Add the sizes to the registry."""
    from stfm.models.registry import register_presets

    rows = {
        "recommended": ("distil", "an image tower (MobileNetV2) trained further on H&E alone, taught by its own start"),
        "tiny": ("distil-tiny", "the same of a few convolutions at 28 px; for tests"),
    }
    register_presets(models, Distillation, rows, reference="Hinton et al. 2015, arXiv:1503.02531")
