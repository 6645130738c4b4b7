"""CLIP and PLIP baselines: one image tower, one linear map of the genes, one contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive
from stfm.models._slots import EncoderChoice, as_choice, build_gene, build_image, check_batch, fit_gene_encoder
from stfm.models.base import Embedding, Model
from stfm.models.inputs import InputSpec
from stfm.nn.fusion import fill_missing
from stfm.nn.heads import NORMS, PROJECTIONS, Projection
from stfm.nn.losses import NEGATIVES, Temperature, contrastive_loss, excluded_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm._registry import Registry
    from stfm.models.inputs import SlideInputs
    from stfm.models.registry import ModelSpec
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary

JOINTS = ("concat", "mean", "image", "gene")


@dataclass(frozen=True)
class ContrastiveConfig:
    """Configuration of the CLIP-like baselines.

    Parameters
    ----------
    image, gene
        Encoders, by name or :class:`EncoderChoice`.
    width
        Width of the shared space.
    image_px, image_um
        Side of the spot's tile, in px and (None: the slide's own) in µm.
    projection, projection_norm
        From features to the shared width; an encoder that has the width already is not projected.
    temperature, learn_temperature
        1 / logit scale at the start; learned, clamped at a scale of 100.
    negatives
        From the ``"batch"`` or the same ``"slide"``.
    joint
        Embedding of a spot: both vectors side by side (``"concat"``), their ``"mean"``, or one of them.
    min_fraction
        Smallest share of the vocabulary that a slide must have measured.
    """

    image: EncoderChoice = field(default_factory=lambda: EncoderChoice("clip-vit-b32"))
    gene: EncoderChoice = field(default_factory=lambda: EncoderChoice("gene-linear"))
    width: int = 32
    image_px: int = 224
    image_um: float | None = None
    projection: str = "linear"
    projection_norm: str = "none"
    temperature: float = 0.07
    learn_temperature: bool = True
    negatives: str = "batch"
    joint: str = "concat"
    min_fraction: float = 0.2

    def __post_init__(self) -> None:
        for slot in ("image", "gene"):
            choice = as_choice(slot, getattr(self, slot), slot)
            if choice is None:
                msg = f"A contrastive model needs an encoder in slot {slot!r}."
                raise InputError(msg)
            object.__setattr__(self, slot, choice)
        for name, choices in (
            ("projection", PROJECTIONS),
            ("projection_norm", NORMS),
            ("negatives", NEGATIVES),
            ("joint", JOINTS),
        ):
            check_choice(name, getattr(self, name), choices)
        check_count("width", self.width)
        check_count("image_px", self.image_px)
        check_positive("temperature", self.temperature)


class Contrastive(Model):
    """Image tower and gene map into one space, symmetric cross-entropy over the batch.

    As STimage-1K4M trains CLIP and PLIP: genes through ``Linear(n, 32)``, image features through ``Linear(512, 32)``,
    L2-normalised, learned logit scale from ``log(1 / 0.07)``, mean of the two cross-entropies, the tower tuned in full.

    Parameters
    ----------
    config
        See :class:`ContrastiveConfig`.
    vocabulary
        Genes that the model reads.
    pretrained
        Read the checkpoints that the encoder choices name.

    References
    ----------
    Radford et al. 2021, arXiv:2103.00020; Huang et al. 2023, Nature Medicine; Chen et al. 2024, arXiv:2406.06393.
    """

    family: ClassVar[str] = "contrastive"
    config_class: ClassVar[type[Any]] = ContrastiveConfig
    config: ContrastiveConfig

    def __init__(self, config: ContrastiveConfig, vocabulary: Vocabulary | None, *, pretrained: bool = True) -> None:
        super().__init__(config, vocabulary, pretrained=pretrained)
        self.image = build_image(config.image, pretrained=pretrained)
        self.gene = build_gene(config.gene, vocabulary, pretrained=pretrained)
        self.image_projection = self._projection(self.image.width)
        self.gene_projection = self._projection(self.gene.width)
        self.temperature = Temperature(config.temperature, learned=config.learn_temperature)
        for module in [*self.image_projection.modules(), *_linear_gene_map(self.gene)]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _projection(self, in_width: int) -> nn.Module:
        config = self.config
        if in_width == config.width and config.projection == "linear":
            return nn.Identity()
        return Projection(in_width, config.width, kind=config.projection, norm=config.projection_norm)

    @property
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot."""
        return InputSpec(
            spot_px=self.config.image_px,
            niche_px=None,
            spot_um=self.config.image_um,
            niche_counts=False,
            min_fraction=self.config.min_fraction,
        )

    def forward(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return the image and the gene vector, unit length, ``(b, d)`` each; None where absent."""
        features = batch.spot_features
        if features is not None and not self.image.frozen:
            msg = (
                f"The batch holds precomputed features, but encoder {self.image.spec.name!r} is not frozen; give tiles."
            )
            raise InputError(msg)
        if features is None and batch.spot_tiles is not None:
            features = self.image(batch.spot_tiles, batch.spot_mpp)
        image = None if features is None else F.normalize(self.image_projection(features), dim=-1)
        gene = None
        if batch.counts is not None:
            gene = F.normalize(self.gene_projection(self.gene(batch.counts, batch.gene_mask)), dim=-1)
        return image, gene

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"``, the mean of the two cross-entropies.

        Raises
        ------
        InputError
            The batch lacks a modality, or has one spot in training.
        """
        check_batch(batch, training=self.training)
        image, gene = self(batch)
        if image is None or gene is None:
            absent = "image" if image is None else "counts"
            msg = f"The batch has no {absent}; contrastive models are trained on spots that have both modalities."
            raise InputError(msg)
        excluded = excluded_pairs(batch, negatives=self.config.negatives)
        return {"loss": contrastive_loss(image, gene, scale=self.temperature(), excluded=excluded)}

    def embed(self, batch: Batch) -> Embedding:
        """Return the embedding of every spot; an absent modality is stood in for by the other one."""
        image, gene = self(batch)
        first, second = fill_missing(image, gene)
        if self.config.joint == "concat":
            joint = torch.cat([first, second], dim=-1) / 2**0.5
        elif self.config.joint == "mean":
            joint = F.normalize(first + second, dim=-1)
        else:
            joint = first if self.config.joint == "image" else second
        return Embedding(joint=joint, image=image, gene=gene)

    def fit_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Fit scales or principal components of the gene encoder, where it has any."""
        fit_gene_encoder(self.gene, slides, niche=False)

    def frozen_image_encoder(self, level: str) -> nn.Module | None:
        """Return the image tower for ``"spot"`` if it is frozen."""
        return self.image if level == "spot" and self.image.frozen else None


def _linear_gene_map(encoder: nn.Module) -> list[nn.Module]:
    """Return the gene encoder's only linear map, or nothing where it is a deeper network."""
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    return list(linear) if len(linear) == 1 else []


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIP baseline: ViT-B/32 tower tuned in full, genes through one linear map", {}),
    "plip": ("PLIP baseline: the same with PLIP's tower", {"image": EncoderChoice("plip-vit-b32")}),
    "clip-small": (
        "CLIP-like baseline for two cores: a small residual network at 56 px",
        {"image": EncoderChoice("resnet-small", options={"stem": "imagenet"}), "image_px": 56},
    ),
    "plip-small": (
        "PLIP-like baseline for two cores: fixed stain and texture features of histology at 112 px",
        {"image": EncoderChoice("handcrafted"), "image_px": 112, "projection": "mlp", "projection_norm": "batch",
         "gene": EncoderChoice("gene-mlp", options={"width": 32, "hidden": [], "dropout": 0.0})},
    ),
}  # fmt: skip


def register(models: Registry[ModelSpec]) -> None:
    """Add the baselines to the registry."""
    from stfm.models.registry import ModelSpec

    for name, (summary, values) in PRESETS.items():
        spec = ModelSpec(
            name=name,
            family=Contrastive.family,
            summary=summary,
            reference="arXiv:2103.00020" if name.startswith("clip") else "doi:10.1038/s41591-023-02504-3",
            factory=Contrastive,
            config=partial(ContrastiveConfig, **values),
        )
        models.register(name, spec)
