"""STORM: H&E and expression of spots in windows of neighbours, learned by masking, then aligned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice
from stfm.models._sample import Sample, genes_measured
from stfm.models._slots import build_gene, build_image, check_batch, fit_gene_encoder
from stfm.models._storm_calibrate import fit_calibration, fit_expected_variance
from stfm.models._storm_components import SlideComponents, fit_components
from stfm.models._storm_field import LatentField, fit_field, read_latent
from stfm.models._storm_fit import (
    fit_image_scale,
    fit_table,
    fit_window_regression,
    keep_scaled_features,
    learn_genes,
)
from stfm.models._storm_linear import WindowRegression, window_features
from stfm.models._storm_spatial import Decoder, Shown, SpatialEncoder, Windows, draw_masks
from stfm.models._storm_tokens import ImageTokens
from stfm.models.base import Embedding, Model, Prediction, TunedParts
from stfm.models.inputs import InputSpec
from stfm.models.storm_config import STAGES, STORMConfig
from stfm.nn.counts import gaussian_nll
from stfm.nn.gene_table import GeneTable
from stfm.nn.losses import Temperature, contrastive_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from stfm._registry import Registry
    from stfm.models.inputs import SlideInputs
    from stfm.models.registry import ModelSpec
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary


_DECODERS = ("image_decoder.", "gene_decoder.", "image_log_variance")


class STORM(Model):
    """STORM of Xiang et al.: spot level, then spatial level.

    A spot is one token of H&E and one of expression; the tokens of a window of neighbours go through blocks with
    attention over both modalities, whose bias falls with the distance in µm, and a feed-forward for each modality. It
    learns by masking (``stage = "mask"``): a decoder each writes the hidden image features and the hidden expression;
    then by alignment (``stage = "align"``): the window's H&E and its counts, encoded apart, find each other.

    Expression is read from any panel and written for any gene through one table of gene embeddings
    (:class:`~stfm.nn.gene_table.GeneTable`).

    Parameters
    ----------
    config
        See :class:`STORMConfig`.
    vocabulary
        Genes of the model.
    pretrained
        Read the checkpoints that the encoder choices name.

    References
    ----------
    Xiang et al., A Multimodal Foundation Model of Spatial Transcriptomics and Histology for Biological Discovery and
    Clinical Prediction, arXiv:2604.03630, 2026.
    """

    family: ClassVar[str] = "storm"
    config_class: ClassVar[type[Any]] = STORMConfig
    stages: ClassVar[tuple[str, ...]] = STAGES
    tuned_parts: ClassVar[TunedParts | None] = TunedParts(
        "spatial", {"mask": _DECODERS, "align": (*_DECODERS, "align_heads.", "temperature.")}
    )
    config: STORMConfig
    typical_total: Tensor
    calibration: Tensor
    expected_variance: Tensor
    trained_on: Tensor
    paired: Tensor

    def __init__(self, config: STORMConfig, vocabulary: Vocabulary | None, *, pretrained: bool = True) -> None:
        super().__init__(config, vocabulary, pretrained=pretrained)
        if vocabulary is None:
            msg = "STORM writes expression and so needs a vocabulary: create(name, vocabulary)."
            raise InputError(msg)
        n_genes, d = len(vocabulary), config.width
        self.table = GeneTable(n_genes, config.gene_width, likelihood=config.likelihood)
        self.image: ImageTokens | None = None
        self.image_decoder: Decoder | None = None
        self.linear: WindowRegression | None = None
        if config.reads_image and config.image is not None:
            self.image = ImageTokens(build_image(config.image, pretrained=pretrained), config)
            self.image_decoder = Decoder(config, self.image.width)
            self.image_log_variance = nn.Parameter(torch.zeros(self.image.width))
            if config.linear_blend > 0 and self.image.encoder.frozen:
                self.linear = WindowRegression(self.image.width, n_genes, standardise=config.feature_components == 0)
        self.gene_encoder = None
        if config.gene is not None:
            self.gene_encoder = build_gene(config.gene, vocabulary, pretrained=pretrained)
        self.gene_token = nn.Linear(config.gene_width if self.gene_encoder is None else self.gene_encoder.width, d)
        self.spatial = SpatialEncoder(config)
        self.gene_decoder = Decoder(config, config.gene_width)
        self.field = LatentField(config.gene_width) if config.joint == "field" else None
        self.slide_components: SlideComponents | None = None
        self.align_heads = nn.ModuleDict({name: _identity(d) for name in ("image", "gene")})
        self.temperature = Temperature(config.temperature, learned=True)
        self.register_buffer("typical_total", torch.full((), 1e4))
        # Bits: 1 H&E, 2 counts were there in training; 0 before any.
        self.register_buffer("trained_on", torch.zeros((), dtype=torch.int64))
        self.register_buffer("paired", torch.zeros(n_genes, dtype=torch.bool))
        self.register_buffer("calibration", torch.ones(n_genes))
        # Of latent expression around what H&E and neighbours tell of it; 1 is that of the table itself.
        self.register_buffer("expected_variance", torch.ones(config.gene_width))
        # By the number of a slide: what was made ready, and how far expression reaches on it.
        self._ready: dict[int, SlideInputs] = {}
        self._fields: dict[int, LatentField] = {}
        self.stage = "mask"

    @property
    def stage(self) -> str:
        """What :meth:`losses` trains: ``"mask"`` or ``"align"``."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        self._stage = check_choice("stage", stage, STAGES)
        aligning = stage == "align"
        for part in (self.align_heads, self.temperature):
            part.requires_grad_(aligning)
        masking = not aligning or self.config.replay > 0
        for decoder in (self.image_decoder, self.gene_decoder):
            if decoder is not None:
                decoder.requires_grad_(masking)

    @property
    def inputs(self) -> InputSpec:
        """What the model wants to see of every spot."""
        config = self.config
        return InputSpec(
            spot_px=config.spot_px if config.reads_image else None,
            niche_px=None,
            contexts_um=config.contexts_um if config.reads_image else (),
            window=config.window_size,
            niche_counts=False,
            centre=() if config.slide_norm == "none" else ("image",),
            standardise=config.slide_norm == "standardise",
            min_fraction=config.min_fraction,
        )

    def layers(self) -> list[list[nn.Module]]:
        """Return the modules from input to output, for layer-wise learning rates: embeddings, then the blocks."""
        embeddings: list[nn.Module] = [
            part for part in (self.image, self.table, self.gene_encoder, self.gene_token) if part is not None
        ]
        return [embeddings, *([block] for block in self.spatial.blocks)]

    def windows(self, batch: Batch) -> Windows:
        """Return the windows of a batch with a token for each spot and modality."""
        if batch.window is None or batch.xy_um is None:
            msg = "STORM reads windows of spots with coordinates; make batches with SlideInputs."
            raise InputError(msg)
        window, xy_um = batch.window, batch.xy_um
        present = window >= 0
        rows = window.clamp_min(0)
        tokens: dict[str, Tensor] = {}
        batch = self._known_modalities(batch)
        features = None if self.image is None else self.image.features(batch)
        if self.image is not None and features is not None:
            tokens["image"] = self.image(features)[rows]
        gene = torch.zeros_like(present)
        if self.config.reads_gene and batch.counts is not None:
            tokens["gene"] = self._gene_tokens(batch.counts, batch.gene_mask)[rows]
            gene = present if batch.measured is None else present & batch.measured[rows]
        if not tokens:
            msg = "The batch has neither H&E nor counts that the model reads."
            raise InputError(msg)
        xy = xy_um[rows]
        image = present if "image" in tokens else torch.zeros_like(present)
        return Windows(rows, present, image, gene, tokens, features, xy, self.spatial.bias(xy))

    def _gene_tokens(self, counts: Tensor, mask: Tensor | None) -> Tensor:
        if self.gene_encoder is not None:
            return self.gene_token(self.gene_encoder(counts, mask))  # type: ignore[no-any-return]
        return self.gene_token(self.latent(counts, mask))  # type: ignore[no-any-return]

    def _known_modalities(self, batch: Batch) -> Batch:
        """Leave out what no training slide had, whose encoders know nothing."""
        kind = int(self.trained_on)
        absent = [name for bit, name in ((1, "image"), (2, "gene")) if kind and not kind & bit]
        left = batch.without(*absent)
        if (batch.has_image or batch.has_gene) and not (left.has_image or left.has_gene):
            trained = "counts" if kind == 2 else "H&E"
            msg = f"this model was trained on {trained} alone and cannot read slides without; train it on both."
            raise InputError(msg)
        return left

    def latent(self, counts: Tensor, mask: Tensor | None) -> Tensor:
        """Return the latent expression that the gene table reads from counts, ``(n, e)``."""
        return self.table.read(counts, mask)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``"loss"`` and its parts: ``"image"``, ``"gene"`` (masked), ``"align"``, by the stage.

        Raises
        ------
        InputError
            The stage needs a modality that the batch lacks; the message says which stage can run.
        """
        check_batch(batch, training=self.training)
        if self.stage == "mask":
            return self._mask_losses(batch)
        align = self._align_loss(batch)
        if self.config.replay == 0:
            return {"loss": align, "align": align}
        masked = self._mask_losses(batch)
        total = align + self.config.replay * masked.pop("loss")
        return {"loss": total, "align": align, **masked}

    def _mask_losses(self, batch: Batch) -> dict[str, Tensor]:
        windows = self.windows(batch)
        config = self.config
        shown = draw_masks(
            windows.present, windows.image, windows.gene, n_visible=config.n_visible,
            cross_share=config.cross_share if batch.counts is not None else 0.0,
        )  # fmt: skip
        encoded = self.spatial(windows.tokens, shown, windows.bias)
        parts: dict[str, Tensor] = {}
        if self.image_decoder is not None and windows.features is not None:
            parts["image"] = self._image_loss(windows, encoded, shown)
        if batch.counts is not None:
            parts["gene"] = self._gene_loss(batch, windows, encoded, shown)
        weights = {"image": config.image_weight, "gene": config.gene_weight}
        return {"loss": torch.stack([weights[name] * part for name, part in parts.items()]).sum(), **parts}

    def _image_loss(self, windows: Windows, encoded: dict[str, Tensor], shown: Shown) -> Tensor:
        """Gaussian likelihood of the hidden image features, a variance a feature."""
        decoder, features = cast("Decoder", self.image_decoder), cast("Tensor", windows.features)
        hidden = windows.image & ~shown.image
        written = decoder(encoded, shown, windows.bias)[hidden].float()
        target = features[windows.rows[hidden]].detach().float()
        return _mean(gaussian_nll(target, written, self.image_log_variance))

    def _gene_loss(self, batch: Batch, windows: Windows, encoded: dict[str, Tensor], shown: Shown) -> Tensor:
        """Likelihood of the hidden expression, of the genes that were measured."""
        counts, totals = cast("Tensor", batch.counts), cast("Tensor", batch.totals)
        measured = windows.present if batch.measured is None else windows.present & batch.measured[windows.rows]
        hidden = measured & ~shown.gene
        u = self.gene_decoder(encoded, shown, windows.bias)[hidden].float()
        rows = windows.rows[hidden]
        genes = self._drawn_genes(counts.device)
        with torch.autocast(u.device.type, enabled=False):
            loss = self.table.nll(u, counts[rows[:, None], genes].float(), totals[rows], genes)
        if batch.gene_mask is None:
            return _mean(loss)
        return _mean(loss, batch.gene_mask[rows[:, None], genes].to(loss.dtype))

    def _drawn_genes(self, device: torch.device) -> Tensor:
        n = len(self.table.known)
        if n <= self.config.max_genes or not self.training:
            return torch.arange(n, device=device)
        return torch.randperm(n, device=device)[: self.config.max_genes]

    def _align_loss(self, batch: Batch) -> Tensor:
        """Contrast of each window's H&E with its counts (the negatives are the other windows of the batch)."""
        windows = self.windows(batch)
        lacking = [what for name, what in (("image", "H&E"), ("gene", "counts")) if name not in windows.tokens]
        if lacking:
            msg = f"The batch has no {lacking[0]}, and alignment needs both modalities; stage='mask' can run."
            raise InputError(msg)
        apart = [self._apart(windows, name) for name in ("image", "gene")]
        return contrastive_loss(*apart, scale=self.temperature())

    def _apart(self, windows: Windows, name: str) -> Tensor:
        """Return the middle of each window from one modality alone, in the shared space, ``(b, d)``."""
        shown = windows.shown(image=name == "image", gene=name == "gene")
        encoded = self.spatial({name: windows.tokens[name]}, shown, windows.bias)[name]
        return self.align_heads[name](encoded[:, 0])  # type: ignore[no-any-return]

    def embed(self, batch: Batch) -> Embedding:
        """Return the embedding of every spot.

        Returns
        -------
        ``joint``: the spot's tokens after the spatial level (one stands in for the other where a modality is absent),
        or the latent expression of its surroundings (``joint="field"``), after the components of the slides that the
        model was adapted to, where it was (``slide_components``, which makes it wider); ``image``, ``gene``: of one
        modality alone, in one space once ``stage="align"`` was trained; ``niche``: mean of the window's tokens.
        """
        windows = self.windows(batch)
        shown = windows.shown()
        encoded = self.spatial(windows.tokens, shown, windows.bias)
        if self.field is None:
            middle = {name: F.normalize(tokens[:, 0], dim=-1) for name, tokens in encoded.items()}
            pair = [middle.get(name, next(iter(middle.values()))) for name in ("image", "gene")]
            joint = F.normalize(torch.cat(pair, dim=-1) if self.config.joint == "concat" else pair[0] + pair[1], dim=-1)
        else:
            written = self.gene_decoder(encoded, shown, windows.bias, middle=True)[:, 0].float()
            joint = self._latent(batch, windows, written, self.field)
            joint = joint if self.slide_components is None else self.slide_components(joint, batch, windows, written)
        apart = {name: F.normalize(self._apart(windows, name), dim=-1) for name in encoded}
        weight = windows.present[..., None].to(windows.xy_um.dtype)
        means = [(tokens * weight).sum(dim=1) / weight.sum(dim=1) for tokens in encoded.values()]
        niche = F.normalize(torch.stack(means).mean(dim=0), dim=-1)
        return Embedding(joint, apart.get("image"), apart.get("gene"), niche)

    def _latent(self, batch: Batch, windows: Windows, written: Tensor, field: LatentField) -> Tensor:
        """Return the latent expression that each window shares; what the decoder wrote where none was measured.

        A component has the size that it has in expression, the length of its column of gene embeddings.
        """
        size = self.table.embedding.norm(dim=0)
        if "gene" not in windows.tokens or batch.counts is None:
            return size * written  # type: ignore[no-any-return]
        latent = self.latent(batch.counts, batch.gene_mask)
        shared = torch.empty_like(written)
        slides = windows.rows.new_zeros(len(written)) if batch.slide_id is None else batch.slide_id[windows.rows[:, 0]]
        for slide in slides.unique().tolist():
            here = slides == slide
            one = self._field_of(slide, field)
            shared[here] = one(latent[windows.rows[here]], windows.xy_um[here], windows.gene[here])
        return size * torch.where(windows.gene.any(dim=1, keepdim=True), shared, written)  # type: ignore[no-any-return]

    def _field_of(self, slide: int, field: LatentField) -> LatentField:
        """Return the field as the slide itself tells it, too, where it was made ready."""
        if not self.config.own_field or slide not in self._ready:
            return field
        if slide not in self._fields:
            found = read_latent(self.table, self._ready[slide])
            self._fields[slide] = field if found is None else field.adapted(*found)
        return self._fields[slide]

    def predict(self, batch: Batch, *, own: bool = False) -> Prediction:
        """Return expected log-normalised expression of every spot, and its deviation.

        Parameters
        ----------
        batch
            With H&E, with counts of some spots (``measured``), or both.
        own
            Whether the counts of the spot itself may be used (denoising), or those of its neighbours alone.
        """
        windows = self.windows(batch)
        u = self.expected(windows)
        mean, variance = self._written(u)
        blend = self.config.linear_blend
        if self.linear is not None and bool(self.linear.fitted) and windows.features is not None:
            seen = window_features(windows.features[windows.rows], windows.xy_um, windows.present)
            mean = (1 - blend) * mean + blend * self.linear(seen)
        if own and "gene" in windows.tokens:
            # The regression reads no counts; where the spot itself was measured, its counts say more.
            measured = windows.gene[:, :1]
            mean = torch.where(measured, self._written(self._updated(batch, windows, u))[0], mean)
        return Prediction(mean, variance.sqrt() * self.calibration)

    def _written(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            return self.table.moments(self.table.write(u), self.typical_total)

    def expected(self, windows: Windows) -> Tensor:
        """Return the latent expression of each middle as H&E and the counts of its neighbours tell it, ``(b, e)``."""
        others = windows.gene.clone()
        others[:, 0] = False
        shown = Shown(windows.present, windows.image, others)
        encoded = self.spatial(windows.tokens, shown, windows.bias)
        return self.gene_decoder(encoded, shown, windows.bias, middle=True)[:, 0].float()  # type: ignore[no-any-return]

    def _updated(self, batch: Batch, windows: Windows, expected: Tensor) -> Tensor:
        """Return the same after each spot's own counts were looked at."""
        rows = windows.rows[:, 0]
        counts = cast("Tensor", batch.counts)[rows].float()
        mask = None if batch.gene_mask is None else batch.gene_mask[rows]
        with torch.autocast(expected.device.type, enabled=False):
            return self.table.update(expected, self.expected_variance, counts, mask)

    def written_genes(self) -> NDArray[np.bool_]:
        """Return which genes were measured on a training slide, bool ``(G,)``."""
        return self.table.known.cpu().numpy()

    def paired_genes(self) -> NDArray[np.bool_]:
        """Return which genes were measured on a training slide with H&E, bool ``(G,)``."""
        return self.paired.cpu().numpy()

    def fit_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Start from the training slides: gene table, scale of image features, regression on windows."""
        with_counts = self._note(slides)
        if with_counts:
            self.typical_total.fill_(fit_table(self.table, with_counts, within=self.config.within_slides))
            if self.field is not None:
                fit_field(self.field, self.table, with_counts)
            if self.gene_encoder is not None:
                fit_gene_encoder(self.gene_encoder, with_counts, niche=False)
        if self.image is not None:
            fit_image_scale(self.image, slides)
        self._fit_regression(with_counts)

    def adapt_inputs(self, slides: Sequence[SlideInputs]) -> None:
        """Learn genes that are new, and what new slides say of themselves; fit the regression on windows to them."""
        with_counts = self._note(slides)
        if with_counts:
            learn_genes(self.table, with_counts)
            if self.config.slide_components:
                sample = Sample.of(with_counts, len(self.table.known), patch=True)
                found = fit_components(self.table, sample, self.config.slide_components)
                self.slide_components = self.slide_components if found is None else found
        self._fit_regression(with_counts)

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Make room for the components of the slides that a saved model was adapted to."""
        size = state.get("slide_components.embedding")
        self.slide_components = None if size is None else SlideComponents(len(size), self.table.width, size.shape[1])

    def _note(self, slides: Sequence[SlideInputs]) -> list[SlideInputs]:
        """Remember which modalities training had, and of which genes both; return the slides with counts."""
        with_counts = [slide for slide in slides if slide.has_gene]
        self.trained_on |= int(any(slide.has_image for slide in slides)) + 2 * bool(with_counts)
        self.paired |= genes_measured(slides, len(self.paired), paired=True).to(self.paired.device)
        return with_counts

    def _fit_regression(self, slides: Sequence[SlideInputs]) -> None:
        if self.image is not None and self.linear is not None:
            fit_window_regression(self.linear, self.image, slides)

    def calibrate(self, slides: Sequence[SlideInputs], *, held_out: bool) -> None:
        """Give the predicted deviations the size of the errors on these slides, gene by gene."""
        self.calibration.fill_(1.0)
        factor = fit_calibration(self, slides, held_out=held_out, linear=self.linear)
        if factor is not None:
            self.calibration.copy_(factor)
            self.expected_variance.copy_(fit_expected_variance(self, slides))

    def ready(self, slides: Sequence[SlideInputs]) -> None:
        """Scale the features of frozen encoders once instead of in every batch; know the slides that are read."""
        self._ready = {slide.slide_id: slide for slide in slides if slide.has_gene}
        self._fields = {}
        if self.image is not None and self.image.encoder.frozen:
            keep_scaled_features(self.image, slides)

    def frozen_image_encoder(self, level: str) -> nn.Module | None:
        """Return the image encoder if it is frozen, or None."""
        if level != "spot" or self.image is None or not self.image.encoder.frozen:
            return None
        return self.image.encoder


def _identity(width: int) -> nn.Linear:
    """Return a linear map that starts as the identity, so that it changes nothing before it is trained."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _mean(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean; 0, still joined to what made it, where nothing was hidden in the whole batch."""
    if weight is None:
        return loss.sum() / max(1, loss.numel())
    return (loss * weight).sum() / weight.sum().clamp_min(1.0)


def register(models: Registry[ModelSpec]) -> None:
    """Add STORM's sizes to the registry."""
    from stfm.models.registry import register_presets

    rows = {
        "recommended": ("storm", "STORM with the paper's image tower (H0-mini) and a spatial level of 12 blocks"),
        "paper": ("storm-paper", "the same, masked to the letter: 5 visible spots a modality, nothing else"),
        "base": ("storm-base", "the tower that stfm trains itself, 2 blocks, d = 128; what is pretrained"),
        "small": ("storm-small", "light towers, 2 blocks, d = 96; trains on two cores"),
        "tiny": ("storm-tiny", "the lightest, d = 48; for tests and first looks"),
    }
    register_presets(models, STORM, rows, reference="arXiv:2604.03630")
