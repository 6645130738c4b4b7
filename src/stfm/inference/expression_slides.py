"""From slides to the tables that a predictor of expression is fitted on: image features, genes, targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from stfm._errors import InputError, WrongTypeError
from stfm._validate import did_you_mean
from stfm.inference.contexts import context_features, default_contexts, surround
from stfm.inference.expression import RANKS, ExpressionPredictor, fit_expression
from stfm.inference.features import encoder_fingerprint
from stfm.inference.predict import nearest_genes
from stfm.metrics._protocols import GENE_SETS, select_genes
from stfm.slide.gene_match import match_genes
from stfm.slide.genes import Panel, Vocabulary
from stfm.slide.normalise import log_normalise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stfm.inference.expression import Method, Rule
    from stfm.models.base import Model
    from stfm.slide.slide import Slide

__all__ = ["SlideFeatures", "fit_on_slides", "predict_slide", "targets_of"]


@dataclass(frozen=True)
class SlideFeatures:
    """How the image features of a slide are made; made the same way for training and prediction.

    Attributes
    ----------
    source
        Image encoder, or a trained model.
    name
        Name of the encoder or model, for the record.
    fingerprint
        Hash of its weights.
    contexts_um
        Sides of the tiles in µm; empty for a model, which has its own.
    rings
        Rings of neighbours whose means are appended.
    tile_px
        Side in px at which tiles are shown to an encoder.
    batch_size, device, cache
        As of :func:`~stfm.inference.contexts.context_features`.
    """

    source: Any
    name: str
    fingerprint: str
    contexts_um: tuple[float, ...]
    rings: int
    tile_px: int = 224
    batch_size: int = 64
    device: str = "auto"
    cache: bool = True

    @classmethod
    def of(
        cls,
        source: Any,
        slides: Sequence[Slide],
        *,
        weights: str | Path | None = None,
        contexts_um: Sequence[float] | None = None,
        rings: int = 2,
        tile_px: int = 224,
        batch_size: int = 64,
        device: str = "auto",
        cache: bool = True,
    ) -> SlideFeatures:
        """Settle how features are made for these slides; ``source`` is an encoder, its name, or a trained model."""
        from stfm.models.base import Model as ModelClass

        contexts: tuple[float, ...] = ()
        if isinstance(source, ModelClass):
            name = str(getattr(source.config, "name", type(source).__name__))
        else:
            source = _encoder(source, weights)
            name = str(getattr(getattr(source, "spec", None), "name", type(source).__name__))
            contexts = tuple(map(float, default_contexts(slides) if contexts_um is None else contexts_um))
            if not contexts:
                msg = "contexts_um is empty; give at least one tile size in µm."
                raise InputError(msg)
        return cls(source, name, encoder_fingerprint(source), contexts, rings, tile_px, batch_size, device, cache)

    @classmethod
    def like(
        cls,
        described: Mapping[str, Any],
        source: Any,
        *,
        weights: str | Path | None = None,
        batch_size: int = 64,
        device: str = "auto",
        cache: bool = True,
    ) -> SlideFeatures:
        """Return the features that a predictor was fitted on, made by ``source``, which must have the same weights."""
        extractor = cls.of(
            source, [], weights=weights, contexts_um=described["contexts_um"], rings=int(described["rings"]),
            tile_px=int(described["tile_px"]), batch_size=batch_size, device=device, cache=cache,
        )  # fmt: skip
        if extractor.fingerprint != described["fingerprint"]:
            msg = (
                f"the predictor was fitted on features of {described['name']!r} with other weights than "
                f"those of {extractor.name!r} given here; give the same with features= (and weights=)."
            )
            raise InputError(msg)
        return extractor

    def described(self) -> dict[str, Any]:
        """Return how they are made, for the record of a predictor."""
        return {
            "name": self.name, "fingerprint": self.fingerprint, "contexts_um": list(self.contexts_um),
            "rings": self.rings, "tile_px": self.tile_px,
        }  # fmt: skip

    def __call__(self, slide: Slide) -> NDArray[np.float32]:
        """Return the features of a slide, float32 ``(n, f)``."""
        if self.contexts_um:
            return context_features(
                slide, self.source, contexts_um=self.contexts_um, rings=self.rings, tile_px=self.tile_px,
                batch_size=self.batch_size, device=self.device, cache=self.cache,
            )  # fmt: skip
        return surround(self._of_model(slide), slide.coords, self.rings)

    def _of_model(self, slide: Slide) -> NDArray[np.float32]:
        """Return what a model makes of H&E alone: its image and niche parts, and what its frozen encoders saw."""
        from stfm.inference.features import use_frozen_features
        from stfm.inference.stream import embed_slides
        from stfm.models.inputs import SlideInputs

        model = cast("Model", self.source)
        inputs = SlideInputs(slide.without("gene"), model.inputs, model.vocabulary)
        if self.cache or "image" in model.inputs.centre:
            use_frozen_features(model, [inputs], device=self.device, cache=self.cache)
        (parts,) = embed_slides(model, [inputs], batch_size=self.batch_size, device=self.device)
        taken = [parts[name] for name in ("image", "niche") if name in parts] or [parts["joint"]]
        frozen = [f for f in (inputs.spot_features, inputs.niche_features) if f is not None]
        return np.concatenate([*taken, *frozen], axis=1)


def _encoder(source: Any, weights: str | Path | None) -> Any:
    import torch

    from stfm.encoders.build import build_encoder
    from stfm.encoders.registry import ENCODERS

    if isinstance(source, torch.nn.Module):
        return source
    if not isinstance(source, str):
        msg = f"features must be the name of an image encoder, an encoder or a model, got {type(source).__name__}."
        raise WrongTypeError(msg)
    spec = ENCODERS.get(source)
    if spec.modality != "image":
        msg = f"features={source!r} is an encoder of genes; name one of images (sf.encoders.list_encoders())."
        raise InputError(msg)
    if spec.parameters and weights is None:
        msg = f"no weights of {source!r} come with this version; give its checkpoint with weights=, or an encoder."
        raise InputError(msg)
    return build_encoder(source, weights=weights, mode="frozen")


def fit_on_slides(
    slides: Sequence[Slide],
    extractor: SlideFeatures,
    *,
    genes: str | Sequence[str] = "hvg250",
    method: Method = "ridge",
    n_components: int | Sequence[int] = 256,
    ranks: Sequence[int | None] = RANKS,
    rule: Rule = "best",
    rng: int | np.random.Generator | None = 0,
) -> ExpressionPredictor:
    """Fit a predictor on slides with H&E and counts; other arguments as of ``stfm.inference.expression``."""
    names, targets = targets_of(slides, genes)
    seen = {
        field: sorted({str(v) for v in (getattr(slide, field) for slide in slides) if v is not None})
        for field in ("study", "name", "patient")
    }
    return fit_expression(
        [extractor(slide) for slide in slides], targets, names, method=method,
        n_components=n_components, ranks=ranks, rule=rule,
        coords=[slide.coords for slide in slides], rng=rng, described=extractor.described(),
        seen={"studies": seen["study"], "slides": seen["name"], "patients": seen["patient"]},
    )  # fmt: skip


def predict_slide(predictor: ExpressionPredictor, slide: Slide, extractor: SlideFeatures) -> NDArray[np.float32]:
    """Return the predicted expression of a slide, float32 ``(n, g)``."""
    return predictor.predict(extractor(slide))


def targets_of(
    slides: Sequence[Slide], genes: str | Sequence[str] = "hvg250"
) -> tuple[list[str], list[NDArray[np.float32]]]:
    """Return the genes to predict and ``log1p(1e4 c / sum c)`` of them on each slide.

    Parameters
    ----------
    slides
        Training slides with counts.
    genes
        Names, or a gene set that is chosen on these slides among the genes that all of them measured.

    Returns
    -------
    Names of the genes, and one float32 table ``(n, g)`` a slide; size factors are taken over all measured genes.
    """
    panels: list[Panel] = []
    for slide in slides:
        if slide.counts is None or slide.panel is None:
            msg = f"slide {slide.name!r} has no counts to learn from; name their layer with layer=, or leave it out."
            raise InputError(msg)
        panels.append(slide.panel)
    shared = Vocabulary.from_panels(panels, mode="intersection")
    counts, totals = [], []
    for slide, panel in zip(slides, panels, strict=True):
        held = cast("Any", slide.counts)
        counts.append(match_genes(panel, shared, min_fraction=0.0).take(held.to_csr()))
        totals.append(held.totals())
    if isinstance(genes, str):
        if genes not in GENE_SETS:
            msg = f"genes={genes!r} is no gene set; give a list of names. {did_you_mean(genes, GENE_SETS)}"
            raise InputError(msg)
        chosen = select_genes(counts, genes, totals=totals)
    else:
        chosen = _named(list(genes), shared)
    names = [str(name) for name in shared.names[chosen]]
    tables = [log_normalise(c[:, chosen], t).toarray() for c, t in zip(counts, totals, strict=True)]
    return names, tables


def _named(genes: list[str], shared: Vocabulary) -> NDArray[np.int64]:
    if not genes:
        msg = "genes is empty; name at least one."
        raise InputError(msg)
    place = {str(name).upper(): i for i, name in enumerate(shared.names)}
    absent = [gene for gene in genes if str(gene).upper() not in place]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        advice = nearest_genes(str(absent[0]), [str(name) for name in shared.names])
        msg = f"gene {absent[0]!r}{more} is not measured on every reference slide. {advice}"
        raise InputError(msg)
    return np.array([place[str(gene).upper()] for gene in genes], dtype=np.int64)
