"""STORM, multi-branch (SQUALL): branches for image and expression, a shared trunk, complementary masking, alignment."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice
from stfm.models._multibranch_fit import colour_scale, squared_errors
from stfm.models._multibranch_network import TissueNetwork
from stfm.models._multibranch_parts import Tissue, mean_where
from stfm.models._sample import genes_measured
from stfm.models._slots import check_batch, fit_gene_encoder
from stfm.models.base import Embedding, Prediction, TunedParts
from stfm.models.inputs import InputSpec
from stfm.models.storm_multibranch_config import STAGES, StormMultiBranchConfig
from stfm.nn.alignment import match_loss, place_contrast, sample_contrast
from stfm.nn.attention import Attention
from stfm.nn.lora import LoRALinear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stfm._registry import Registry
    from stfm.models.inputs import SlideInputs
    from stfm.models.registry import ModelSpec
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary

_MOMENTUM = 0.05  # of the running mean of squared errors


class StormMultiBranch(TissueNetwork):
    """The multi-branch STORM (published as SQUALL), written from its description.

    A tile of tissue becomes image tokens and expression tokens at places in µm. The first blocks have a feed-forward
    for each modality, the last ones share it; attention is shared throughout. In stage ``"mask"`` each place shows
    either its image or its expression, and two decoders predict what was not shown. In stage ``"align"`` both
    modalities are encoded alone and drawn together by contrast and matching.

    Parameters
    ----------
    config
        See :class:`StormMultiBranchConfig`.
    vocabulary
        Genes that the model reads and predicts.
    pretrained
        No weights come with this model; :meth:`load_published` reads your own copy of the published ones.

    References
    ----------
    Zhang et al., bioRxiv 10.64898/2026.06.01.729028.
    """

    family: ClassVar[str] = "storm-multibranch"
    tuned_parts: ClassVar[TunedParts | None] = TunedParts("encoder", {"mask": ("image_decoder.", "gene_decoder.")})
    paired_stages: ClassVar[tuple[str, ...]] = ("mask", "align")

    def __init__(
        self, config: StormMultiBranchConfig, vocabulary: Vocabulary | None, *, pretrained: bool = True
    ) -> None:
        super().__init__(config, vocabulary, pretrained=pretrained)
        if config.mode == "lora":
            self._add_low_rank()
        self._stage = "both"
        self.stage = "both"

    def _add_low_rank(self) -> None:
        for part in [m for m in self.encoder.modules() if isinstance(m, Attention)]:
            for name in ("q", "v"):
                low = LoRALinear(getattr(part, name), rank=self.config.lora_rank, alpha=self.config.lora_alpha)
                setattr(part, name, low)

    @property
    def stage(self) -> str:
        """Which losses are computed: ``"mask"``, ``"align"`` or ``"both"``; what they do not reach is not trained."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        config = self.config
        if check_choice("stage", stage, STAGES) == "align" and config.mode == "head":
            msg = "mode='head' trains the decoders, which stage 'align' does not use; take stage='mask'."
            raise InputError(msg)
        self._stage = stage
        masking = stage != "align" or config.replay > 0
        for name, parameter in self.named_parameters():
            if name.startswith("gene_decoder."):
                parameter.requires_grad = masking and config.gene_weight > 0
            elif name.startswith("image_decoder."):
                parameter.requires_grad = masking and config.pixel_weight > 0
            else:
                parameter.requires_grad = config.mode == "full" or (config.mode == "lora" and "lora_" in name)

    @property
    def stages(self) -> tuple[str, ...]:  # type: ignore[override]
        """Stages of pretraining, in their order (``stage = "both"`` runs them in one); of decoders alone, the first."""
        return ("mask",) if self.config.mode == "head" else ("mask", "align")

    @property
    def flippable(self) -> bool:
        """Whether a tile may be turned by itself: only where the spot in its middle is read alone."""
        return self.config.n_sites == 1

    @property
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot."""
        config = self.config
        return InputSpec(
            spot_px=config.tile_px,
            niche_px=None,
            spot_um=config.extent_um,
            window=config.n_sites if config.n_sites > 1 else None,
            niche_counts=False,
            min_fraction=config.min_fraction,
        )

    def read(self, batch: Batch) -> Tissue:
        """Return a batch as tiles and the sites in them; the spot that is embedded lies in the middle of its tile.

        Of a batch of windows, the spots of a window that lie in the tile of its middle are its sites.
        """
        if batch.spot_features is not None:
            msg = (
                "The batch holds precomputed image features, but the image branch of the multi-branch STORM is not "
                "frozen: it reads patches; give tiles."
            )
            raise InputError(msg)
        if batch.spot_tiles is None and batch.counts is None:
            msg = (
                "The batch has neither image nor counts; the multi-branch STORM embeds a spot with one of them missing."
            )
            raise InputError(msg)
        half = self.config.extent_um / 2
        middle = torch.full((1, 1, 2), half, device=self.centres.device)
        if batch.window is None or batch.counts is None:
            own = batch if batch.window is None else replace(batch, window=None).take(batch.window[:, 0])
            there = torch.ones(len(own), 1, dtype=torch.bool, device=middle.device)
            if own.measured is not None:
                there = own.measured[:, None]
            counts = None if own.counts is None else own.counts[:, None]
            mask = None if own.gene_mask is None else own.gene_mask[:, None]
            return Tissue(own.spot_tiles, counts, middle, there, mask, whole=own.measured is None)
        if batch.xy_um is None:
            msg = "The batch holds windows without coordinates (xy_um); their spots cannot be put in the tile."
            raise InputError(msg)
        first, rows = batch.window[:, 0], batch.window.clamp_min(0)
        way = (batch.xy_um[rows] - batch.xy_um[first][:, None])[..., :2]
        present = (batch.window >= 0) & (way.abs() < half).all(dim=-1)
        return Tissue(
            tiles=None if batch.spot_tiles is None else batch.spot_tiles[first],
            counts=batch.counts[rows],
            xy_um=way + middle,
            present=present if batch.measured is None else present & batch.measured[rows],
            gene_mask=None if batch.gene_mask is None else batch.gene_mask[rows],
        )

    def _mask_losses(self, patches: Tensor, scaled: Tensor, tissue: Tissue) -> dict[str, Tensor]:
        latent, image_shown, gene_shown, hidden_genes = self._mask(patches, scaled, tissue)
        losses: dict[str, Tensor] = {}
        if self.config.gene_weight > 0:
            if self.config.expression == "bins":
                site = self._owner_of_patches(tissue).expand(len(scaled), -1, -1)
                few, there, shown = self._decoded_bins(latent), site >= 0, gene_shown[:, :, None]
            else:
                site = torch.arange(scaled.shape[1], device=scaled.device).expand(len(scaled), -1)
                few, there, shown = self._decoded_sites(latent), tissue.present, gene_shown

            def loss_at(chosen: Tensor, genes: Tensor | None) -> Tensor:
                rows, sites = torch.nonzero(chosen)[:, 0], site[chosen]
                predicted, target = self._genes(few[chosen]), scaled[rows, sites]
                masks = [m.expand(-1, scaled.shape[1], -1) for m in (genes, tissue.gene_mask) if m is not None]
                counted = [m[rows, sites] for m in masks]
                measured = torch.stack(counted).all(dim=0) if counted else None
                if self.training and genes is None:
                    self._note_residual(predicted, target, measured)
                return _smooth_l1(predicted, target, measured)

            losses["gene"] = loss_at(there & ~shown, None)
            if hidden_genes is not None:
                losses["filled"] = loss_at(there & shown, hidden_genes)
        if self.config.pixel_weight > 0:
            pixels = self._decoded_pixels(latent)
            losses["image"] = _smooth_l1(pixels[~image_shown], patches[~image_shown])
        return losses

    @torch.no_grad()
    def _note_residual(self, predicted: Tensor, target: Tensor, measured: Tensor | None) -> None:
        """Keep a running mean of the squared errors of each gene, in the units of the counts."""
        error = (predicted.float() - target.float()).square()
        weight = torch.ones_like(error) if measured is None else measured.to(error.dtype)
        n = weight.sum(dim=0)
        mean = (error * weight).sum(dim=0) / n.clamp_min(1)
        mean = mean * self.expression.scaler.scale.square()
        self.residual.copy_(torch.where(n > 0, self.residual.lerp(mean, _MOMENTUM), self.residual))

    def _genes(self, few: Tensor) -> Tensor:
        return cast("Tensor", cast("nn.Linear", self.gene_decoder.genes)(few))

    def _align_losses(self, patches: Tensor, scaled: Tensor, tissue: Tissue) -> dict[str, Tensor]:
        config = self.config
        image, gene = self._encode_image(patches), self._encode_gene(scaled, tissue)
        valid = tissue.present
        if config.expression == "bins":
            valid = (self._owner_of_patches(tissue) >= 0).any(dim=2).expand(len(image), -1)
        else:
            image = mean_where(image, self._under(tissue))
        losses: dict[str, Tensor] = {}
        if config.contrastive_weight > 0:
            kinds = [kind for kind, on in ((sample_contrast, config.inter), (place_contrast, config.intra)) if on]
            parts = [kind(image, gene, valid, temperature=config.temperature) for kind in kinds]
            losses["contrastive"] = torch.stack(parts).sum()
        if config.matching_weight > 0:
            weights = valid[:, None]
            whole = [mean_where(x, weights)[:, 0] for x in (image, gene)]
            losses["matching"] = match_loss(whole[0], whole[1], temperature=config.temperature)
        return losses

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the vector of each spot ``(b, d)``: ``"image"``, ``"gene"`` (each encoded alone), ``"joint"``."""
        tissue = self.read(batch)
        patches = None if tissue.tiles is None else self._patches(tissue.tiles)
        scaled = None if tissue.counts is None else self.expression.scaled(tissue.counts, tissue.gene_mask)
        out: dict[str, Tensor] = {}
        if patches is not None:
            out["image"] = self._pooled_image(self._encode_image(patches), tissue)
        if scaled is not None:
            out["gene"] = self._pooled_gene(self._encode_gene(scaled, tissue))
        if patches is not None and scaled is not None:
            image, gene = self._encode_both(patches, scaled, tissue)
            out["joint"] = (self._pooled_image(image, tissue) + self._pooled_gene(gene)) / 2
        else:
            out["joint"] = next(iter(out.values()))
        return {name: vector.float() for name, vector in out.items()}

    def _pooled_image(self, image: Tensor, tissue: Tissue) -> Tensor:
        """Return the mean of the image tokens under the spot, or of all where the tile is an image of bins."""
        if self.config.expression == "bins":
            return image.mean(dim=1)
        return mean_where(image, self._under(tissue)[:, :1])[:, 0]

    def _pooled_gene(self, gene: Tensor) -> Tensor:
        return gene.mean(dim=1) if self.config.expression == "bins" else gene[:, 0]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"`` and its parts: ``"gene"``, ``"image"`` of masking, ``"contrastive"``, ``"matching"``.

        Raises
        ------
        InputError
            The batch lacks a modality, which both stages need, or has one spot in training.
        """
        check_batch(batch, training=self.training)
        for there, what in ((batch.has_image, "image"), (batch.has_gene, "counts")):
            if not there:
                msg = f"The batch has no {what}; both stages of the multi-branch STORM need spots with both modalities."
                raise InputError(msg)
        return self.tissue_losses(self.read(batch))

    def tissue_losses(self, tissue: Tissue) -> dict[str, Tensor]:
        """Return the losses of tiles with any number of sites in them, as :meth:`losses` does of a batch."""
        patches = self._patches(cast("Tensor", tissue.tiles))
        scaled = self.expression.scaled(cast("Tensor", tissue.counts), tissue.gene_mask)
        config = self.config
        weights = {
            "gene": config.gene_weight,
            "filled": config.gene_weight,
            "image": config.pixel_weight,
            "contrastive": config.contrastive_weight,
            "matching": config.matching_weight,
        }
        masked = 1.0 if self.stage != "align" else config.replay
        parts: dict[str, Tensor] = {}
        if masked > 0:
            parts |= self._mask_losses(patches, scaled, tissue)
            weights |= {name: masked * weights[name] for name in parts}
        if self.stage != "mask" and config.mode != "head":
            parts |= self._align_losses(patches, scaled, tissue)
        if not parts:
            msg = f"All losses of stage {self.stage!r} have weight 0; there is nothing to train."
            raise InputError(msg)
        return {"loss": torch.stack([weights[name] * part for name, part in parts.items()]).sum(), **parts}

    def embed(self, batch: Batch) -> Embedding:
        """Return the embedding of every spot.

        Returns
        -------
        ``image``, ``gene``: each modality encoded alone, which alignment makes comparable; ``joint``: the mean of both
        modalities' tokens when encoded together, or the modality that is there.
        """
        out = self(batch)
        return Embedding(joint=out["joint"], image=out.get("image"), gene=out.get("gene"))

    def predict(self, batch: Batch, *, own: bool = False) -> Prediction:
        """Return expected expression of every spot, ``log1p(1e4 c / sum c)``, and its error on held-out slides.

        Parameters
        ----------
        batch
            With H&E, with counts (``measured`` says of which spots), or both.
        own
            Whether the counts of the spot itself may be used (denoising; the model learns it where
            ``config.hidden_genes`` is above 0), or its image and its neighbours alone.
        """
        if own and self.config.hidden_genes == 0:
            msg = (
                "This multi-branch STORM was not trained to denoise or to fill in genes; train one with "
                "config={'hidden_genes': 0.3}."
            )
            raise InputError(msg)
        tissue = self.read(batch)
        decode = self._predicted_of_bins if self.config.expression == "bins" else self._predicted_of_spots
        mean = self.expression.unscaled(self._genes(decode(tissue, own=own)).float())
        return Prediction(mean=mean, deviation=self.residual.sqrt().expand_as(mean))

    def _predicted_of_spots(self, tissue: Tissue, *, own: bool) -> Tensor:
        """Return the decoded site in the middle of each tile, ``(b, gene_width)``."""
        counts, shown = tissue.counts, tissue.present.clone()
        if counts is None:
            counts, shown = self.expression.scaler.mean.expand(len(shown), shown.shape[1], -1), shown & False
        if not own:
            shown[:, 0] = False
        present = tissue.present.clone()
        present[:, 0] = True
        place = tissue._replace(present=present)
        if tissue.tiles is None:
            if not bool(shown.any(dim=1).all()):
                msg = "The batch has no image, and some spots have no counts to be predicted from; give H&E."
                raise InputError(msg)
            patches = torch.zeros(len(shown), len(self.centres), self.image_patch.in_features, device=counts.device)
        else:
            patches = self._patches(tissue.tiles)
        scaled = self.expression.scaled(counts, tissue.gene_mask)
        latent, _ = self._encode_shown(patches, scaled, place, shown, blind=tissue.tiles is None)
        return self._decoded_sites(latent)[:, 0]

    def _predicted_of_bins(self, tissue: Tissue, *, own: bool) -> Tensor:
        """Return the mean over the decoded bins of the spot in the middle, ``(b, gene_width)``."""
        if own and tissue.counts is not None:
            x = self._encode_gene(self.expression.scaled(tissue.counts, tissue.gene_mask), tissue)
        elif tissue.tiles is not None:
            x = self._encode_image(self._patches(tissue.tiles))
        else:
            msg = "The batch has no image, and an image of bins is predicted from it; give H&E."
            raise InputError(msg)
        weights = (self._owner_of_patches(tissue) == 0).flatten(1)[:, None].expand(len(x), -1, -1)
        return mean_where(self._decoded_bins(self._latent_of_bins(x)).flatten(1, 2), weights)[:, 0]

    def written_genes(self) -> NDArray[np.bool_]:
        """Return which genes were measured on a training slide, bool ``(G,)``."""
        return self.learned.cpu().numpy()

    def paired_genes(self) -> NDArray[np.bool_]:
        """Return which genes were measured on a training slide with H&E, bool ``(G,)``."""
        return self.paired.cpu().numpy()

    def layers(self) -> list[list[nn.Module]]:
        """Return the parts from input to output, for learning rates that fall with depth."""
        return [[self.image_patch, self.expression, self.position], *([block] for block in self.encoder.blocks)]

    def fit_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Take the scale of genes (and of pixels, if asked for) from the training slides; note their genes."""
        for known, paired in ((self.learned, False), (self.paired, True)):
            known |= genes_measured(slides, len(known), paired=paired).to(known.device)
        fit_gene_encoder(self.expression, slides, niche=False)  # type: ignore[arg-type]
        scale = colour_scale(slides) if self.config.pixels == "standard" else None
        if scale is not None:
            self.pixel_mean.copy_(scale[0])
            self.pixel_scale.copy_(scale[1])

    def calibrate(self, slides: Sequence[SlideInputs], *, held_out: bool) -> None:
        """Take the deviation of predictions from the errors on slides that were held out of training.

        Without such slides it stays what training left, which is too small.
        """
        if not held_out or not self.learned.any():
            return
        error, n = squared_errors(self, slides, len(self.learned))
        self.residual.copy_(torch.where(n > 0, error, self.residual.double().cpu()))

    def adapted(self, mode: str, **changes: Any) -> StormMultiBranch:
        """Return a copy for fine-tuning, with ``mode`` ``"lora"`` or ``"head"`` and other fields changed.

        Raises
        ------
        InputError
            The model has low-rank additions already, which no other mode holds.
        """
        if self.config.mode == "lora":
            msg = "The model has low-rank additions already; adapt the model that they were added to."
            raise InputError(msg)
        model = type(self)(replace(self.config, mode=mode, **changes), self.vocabulary, pretrained=False)
        model.load_state_dict(self.state_dict(), strict=False)
        model.seen, model.history = copy.deepcopy(self.seen), self.history
        return model.train(self.training)

    def load_published(self, path: str | Path, *, names: dict[str, str] | None = None) -> None:
        """Fill the model from your own copy of the published checkpoint (CC BY-NC-ND; never part of stfm).

        Parameters
        ----------
        path
            safetensors file, or PyTorch file (opened with ``weights_only=True``).
        names
            Regular expressions of names in the file, and what they are to be read as, where they are not the expected
            ones (:mod:`stfm.models._squall_layout`).

        Raises
        ------
        DataIntegrityError
            Names or shapes do not fit; the model is untouched.
        """
        from stfm.models._squall_layout import read_published

        self.load_state_dict(read_published(self, path, names=names or {}))


def _smooth_l1(predicted: Tensor, target: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean Smooth-L1 over what counts; 0 over nothing."""
    loss = F.smooth_l1_loss(predicted.float(), target.float(), reduction="none")
    if counted is None:
        return loss.sum() / max(loss.numel(), 1)
    # Not multiplied: what does not count has a gradient of exactly 0 even where it is infinite.
    return torch.where(counted, loss, 0.0).sum() / counted.sum().clamp_min(1)


def register(models: Registry[ModelSpec]) -> None:
    """Add the multi-branch STORM's sizes to the registry."""
    from stfm.models.registry import register_presets

    rows = {
        "published": ("storm-multibranch", "STORM of two branches at its published size (SQUALL); image of bins"),
        "base": ("storm-multibranch-base", "the same of 12 blocks of width 384, a token a spot"),
        "small": ("storm-multibranch-small", "the same of 6 blocks of width 128, a token a spot; trains on two cores"),
    }
    register_presets(
        models,
        StormMultiBranch,
        rows,
        reference="doi:10.64898/2026.06.01.729028",
        aliases={"storm-multibranch": ("squall",)},
    )
