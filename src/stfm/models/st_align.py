"""ST-Align: image and genes of spots and their niches, aligned at both levels and across them (arXiv:2411.16793)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.models._slots import build_gene, build_image, check_batch, fit_gene_encoder
from stfm.models.base import Embedding, Model
from stfm.models.inputs import InputSpec
from stfm.models.st_align_config import STAlignConfig
from stfm.nn.fusion import ABFN, ConcatFusion, fill_missing
from stfm.nn.heads import Projection
from stfm.nn.losses import Temperature, contrastive_loss, excluded_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm._registry import Registry
    from stfm.encoders.base import GeneEncoder, ImageEncoder
    from stfm.models.inputs import SlideInputs
    from stfm.models.registry import ModelSpec
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary

LOSSES = ("spot", "niche", "spot_niche")


class LevelOutput(NamedTuple):
    """Vectors of one level, ``(b, d)`` each: image and gene in the shared space, and fused; None where absent."""

    image: Tensor | None
    gene: Tensor | None
    fused: Tensor | None


class Level(nn.Module):
    """Spot or niche: two encoders, their projections, and the fusion.

    Parameters
    ----------
    image, gene
        Encoders.
    fusion
        Called with both vectors.
    config
        Width and projections.
    """

    def __init__(self, image: ImageEncoder, gene: GeneEncoder, fusion: nn.Module, config: STAlignConfig) -> None:
        super().__init__()
        project = partial(
            Projection,
            kind=config.projection,
            norm=config.projection_norm,
            dropout=config.projection_dropout,
            normalise=config.projection_layer_norm,
        )
        self.image, self.gene, self.fusion = image, gene, fusion
        self.image_projection = project(image.width, config.width)
        self.gene_projection = project(gene.width, config.width)
        self.modality_dropout = config.modality_dropout

    def forward(
        self,
        *,
        tiles: Tensor | None,
        features: Tensor | None,
        counts: Tensor | None,
        mask: Tensor | None,
        mpp: Tensor | None = None,
    ) -> LevelOutput:
        """Return the level's vectors; ``features`` of a frozen image encoder stand in for ``tiles``."""
        if features is None and tiles is not None:
            features = self.image(tiles, mpp)
        elif features is not None and not self.image.frozen:
            msg = (
                f"The batch holds precomputed image features, but encoder {self.image.spec.name!r} is not frozen "
                f"(mode={self.image.mode!r}); give tiles."
            )
            raise InputError(msg)
        image = None if features is None else self.image_projection(features.to(self._dtype))
        gene = None if counts is None else self.gene_projection(self.gene(counts, mask))
        if image is None and gene is None:
            return LevelOutput(None, None, None)
        has_image, has_gene = self._dropped(image, gene)
        return LevelOutput(image, gene, self.fusion(image, gene, has_image=has_image, has_gene=has_gene))

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.image_projection.parameters()), torch.float32)

    def _dropped(self, image: Tensor | None, gene: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Choose spots that lose one modality before fusion (never both); in training only."""
        if not self.training or self.modality_dropout == 0 or image is None or gene is None:
            return None, None
        n, device = len(image), image.device
        dropped = torch.rand(n, device=device) < self.modality_dropout
        image_goes = torch.rand(n, device=device) < 0.5
        return ~(dropped & image_goes), ~(dropped & ~image_goes)


class Concatenation(nn.Module):
    """Both vectors side by side, each of unit length: nothing is learned."""

    def forward(
        self,
        image: Tensor | None,
        gene: Tensor | None,
        *,
        has_image: Tensor | None = None,
        has_gene: Tensor | None = None,
    ) -> Tensor:
        """Return ``(b, 2 d)``."""
        image, gene = fill_missing(image, gene, has_image, has_gene)
        return torch.cat([F.normalize(image, dim=-1), F.normalize(gene, dim=-1)], dim=-1)


class STAlign(Model):
    """ST-Align (section 3 of the paper).

    Per spot a small tile, the tile of its niche, its counts and its niche's mean counts (eq. 2) go through four
    encoders (eqs. 3-6) and projections to width d; image and gene vectors are aligned at each level by a contrastive
    loss (eq. 10), fused by cross-attention (eqs. 7-9), and the fused spot is aligned with its fused niche (eq. 11).

    With one modality absent at inference, the present one stands in for it in the fusion (``missing="self"``), which
    the alignment makes meaningful, or a learned vector does (``missing="token"``, to be trained with
    ``modality_dropout``).

    Parameters
    ----------
    config
        See :class:`STAlignConfig`.
    vocabulary
        Genes that the model reads.
    pretrained
        Read the checkpoints that the encoder choices name.

    References
    ----------
    Lin et al., ST-Align: A Multimodal Foundation Model for Image-Gene Alignment in Spatial Transcriptomics,
    arXiv:2411.16793, 2024.
    """

    family: ClassVar[str] = "st-align"
    config_class: ClassVar[type[Any]] = STAlignConfig
    config: STAlignConfig

    def __init__(self, config: STAlignConfig, vocabulary: Vocabulary | None, *, pretrained: bool = True) -> None:
        super().__init__(config, vocabulary, pretrained=pretrained)
        self.plan = plan = config.resolved()
        self.levels = nn.ModuleDict()
        for name in plan.levels:
            self.levels[name] = self._level(name)
        names = [name for name in LOSSES if plan.loss_weights[name] > 0]
        self.temperatures = nn.ModuleDict()
        for name in names if plan.temperature_per_loss else ["all"]:
            self.temperatures[name] = Temperature(plan.temperature, learned=plan.learn_temperature)
        self._freeze_untrained()

    def _level(self, name: str) -> Level:
        plan = self.plan
        image_choice, gene_choice = getattr(plan, f"{name}_image"), getattr(plan, f"{name}_gene")
        spot = cast("Level", self.levels["spot"]) if "spot" in self.levels else None
        # Two slots with the same frozen encoder hold it once.
        same = spot is not None and image_choice == plan.spot_image and image_choice.used_as == "frozen"
        image = spot.image if spot and same else build_image(image_choice, pretrained=self.pretrained)
        gene = build_gene(gene_choice, self.vocabulary, pretrained=self.pretrained)
        fusion = spot.fusion if spot and plan.share_levels else make_fusion(plan)
        return Level(image, gene, fusion, plan)

    def _freeze_untrained(self) -> None:
        """Take out of training what no loss reaches, which distributed training would refuse."""
        weights = self.plan.loss_weights
        for name, level in self.levels.items():
            if weights[name] == 0 and weights["spot_niche"] == 0:
                level.requires_grad_(False)
            for part, parameter in cast("Level", level).fusion.named_parameters():
                stand_in = part in ("no_image", "no_gene") and self.plan.modality_dropout == 0
                if stand_in or weights["spot_niche"] == 0:
                    parameter.requires_grad = False

    @property
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot."""
        plan = self.plan
        spot, niche = "spot" in plan.levels, "niche" in plan.levels
        return InputSpec(
            spot_px=plan.spot_px if spot else None,
            niche_px=plan.niche_px if niche else None,
            spot_um=plan.spot_um,
            niche_um=plan.niche_um,
            counts=spot,
            niche_counts=niche,
            n_neighbors=plan.n_neighbors,
            include_self=plan.include_self,
            ties=plan.ties,
            centre=("image", "gene") if plan.centre else (),
            min_fraction=plan.min_fraction,
        )

    def forward(self, batch: Batch) -> dict[str, LevelOutput]:
        """Return the vectors of each level (``"spot"``, ``"niche"``)."""
        outputs = {}
        for name, level in self.levels.items():
            spot = name == "spot"
            outputs[name] = level(
                tiles=batch.spot_tiles if spot else batch.niche_tiles,
                mpp=batch.spot_mpp if spot else batch.niche_mpp,
                features=batch.spot_features if spot else batch.niche_features,
                counts=batch.counts if spot else batch.niche_counts,
                mask=batch.gene_mask,
            )
        return outputs

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"`` (eq. 12) and its parts ``"spot"``, ``"niche"`` (eq. 10) and ``"spot_niche"`` (eq. 11).

        Raises
        ------
        InputError
            The batch lacks a modality (alignment needs both), or has one spot in training.
        """
        check_batch(batch, training=self.training)
        outputs = self(batch)
        weights, plan = self.plan.loss_weights, self.plan
        excluded = excluded_pairs(batch, negatives=plan.negatives, mask_overlap=plan.mask_overlap)
        contrast = partial(contrastive_loss, denominator=plan.denominator, normalise=plan.normalise, excluded=excluded)
        parts: dict[str, Tensor] = {}
        for name, output in outputs.items():
            if weights[name] > 0:
                image, gene = _both(output, name)
                parts[name] = contrast(image, gene, scale=self._scale(name))
        if weights["spot_niche"] > 0:
            spot, niche = (cast("Tensor", outputs[name].fused) for name in ("spot", "niche"))
            parts["spot_niche"] = contrast(spot, niche, scale=self._scale("spot_niche"), symmetric=plan.symmetric_ns)
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}

    def embed(self, batch: Batch) -> Embedding:
        """Return the embedding of every spot.

        Returns
        -------
        ``joint``: the fused vector of the spot, its niche, or both (``config.joint``); ``image``, ``gene``: in the
        shared space; ``niche``: the fused vector of the niche.
        """
        outputs = self(batch)
        fused = {name: self._unit(output.fused) for name, output in outputs.items()}
        wanted = ("spot", "niche") if self.plan.joint == "concat" else (self.plan.joint,)
        vectors = [fused.get(name) for name in wanted]
        missing = [name for name, vector in zip(wanted, vectors, strict=True) if vector is None]
        if missing:
            msg = f"The batch has neither image nor counts of the {missing[0]}s, which joint={self.plan.joint!r} needs."
            raise InputError(msg)
        return Embedding(
            joint=cast("Tensor", self._unit(torch.cat(cast("list[Tensor]", vectors), dim=-1))),
            image=self._part([output.image for output in outputs.values()]),
            gene=self._part([output.gene for output in outputs.values()]),
            niche=fused.get("niche"),
        )

    def fit_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Fit scales and principal components of the gene encoders on the training slides."""
        for name, level in self.levels.items():
            fit_gene_encoder(cast("Level", level).gene, slides, niche=name == "niche")

    def frozen_image_encoder(self, level: str) -> nn.Module | None:
        """Return the frozen image encoder of ``"spot"`` or ``"niche"``, or None."""
        if level not in self.levels:
            return None
        encoder = cast("Level", self.levels[level]).image
        return encoder if encoder.frozen else None

    def _scale(self, name: str) -> Tensor:
        return self.temperatures[name if self.plan.temperature_per_loss else "all"]()  # type: ignore[no-any-return]

    def _unit(self, vector: Tensor | None) -> Tensor | None:
        if vector is None or not self.plan.normalise:
            return vector
        return F.normalize(vector, dim=-1)

    def _part(self, vectors: list[Tensor | None]) -> Tensor | None:
        """Return a modality's part: of both levels side by side, or of the first."""
        chosen = vectors if self.plan.parts == "concat" else vectors[:1]
        units = [self._unit(v) for v in chosen]
        if any(u is None for u in units):
            return None
        return self._unit(torch.cat(cast("list[Tensor]", units), dim=-1))


def make_fusion(config: STAlignConfig) -> nn.Module:
    """Return the fusion that a configuration asks for."""
    if config.fusion == "concat":
        return Concatenation()
    if config.fusion == "linear":
        return ConcatFusion(config.width, missing=config.missing)
    return ABFN(
        config.width,
        n_tokens=config.n_tokens,
        scale=config.attention_scale,
        softmax=config.attention_softmax,
        share_directions=config.share_directions,
        residual=config.residual,
        missing=config.missing,
    )


def _both(output: LevelOutput, level: str) -> tuple[Tensor, Tensor]:
    if output.image is None or output.gene is None:
        absent = "image" if output.image is None else "counts"
        msg = f"The batch has no {absent} at level {level!r}; ST-Align is trained on spots that have both modalities."
        raise InputError(msg)
    return output.image, output.gene


def register(models: Registry[ModelSpec]) -> None:
    """Add ST-Align's sizes to the registry."""
    from stfm.models.registry import register_presets

    rows = {
        "recommended": ("st-align", "ST-Align at the paper's size: ResNet-50, UNI, scGPT, AE-Gene 6 x 8"),
        "paper": ("st-align-paper", "the same, equations literally as printed"),
        "small": ("st-align-small", "light encoders in the four slots, d = 128; trains on two cores"),
        "tiny": ("st-align-tiny", "the lightest, d = 64; for tests and first looks"),
    }
    register_presets(models, STAlign, rows, reference="arXiv:2411.16793")
