"""Encoders in the slots of a model: which one, how used, from which weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stfm._errors import InputError, StfmWarning, WrongTypeError
from stfm._validate import did_you_mean
from stfm.encoders.build import build_encoder
from stfm.encoders.registry import ENCODERS, custom_spec
from stfm.models._sample import fit_limit, sample_spots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from stfm.encoders.base import Encoder, GeneEncoder, ImageEncoder
    from stfm.encoders.spec import EncoderSpec
    from stfm.models.inputs import SlideInputs
    from stfm.nn.batch import Batch
    from stfm.slide.genes import Vocabulary


@dataclass(frozen=True)
class EncoderChoice:
    """What stands in a slot.

    Parameters
    ----------
    name
        Name of :func:`stfm.encoders.list_encoders`, ``"timm:<model>"``, or for images a callable, tiles -> features. A
        model with a callable works and trains, and cannot be saved: register the encoder to save it.
    mode
        ``"full"``, ``"frozen"`` or ``"lora"``; None takes the encoder's own.
    weights
        Checkpoint in a published layout, as :func:`stfm.encoders.build_encoder` takes it (a file, a URL, ``"hub"``);
        read when the model is made, not when it is loaded.
    options
        Arguments of the encoder's family.
    lora_rank
        Rank of the low-rank additions.
    on_mpp
        What is done with tiles at another µm/px than the encoder's: ``"resample"``, ``"error"`` or ``"ignore"``.
    """

    name: str | Callable[[Tensor], Tensor]
    mode: str | None = None
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = 8
    on_mpp: str = "resample"

    @property
    def spec(self) -> EncoderSpec:
        """What is known of the encoder before it is built."""
        return ENCODERS.get(self.name) if isinstance(self.name, str) else custom_spec(self.name)

    @property
    def modality(self) -> str:
        """``"image"`` or ``"gene"``."""
        return self.spec.modality

    @property
    def used_as(self) -> str:
        """The mode, resolved."""
        return self.mode or self.spec.mode


def as_choice(slot: str, value: Any, modality: str) -> EncoderChoice | None:
    """Return a choice from a name, a mapping (of JSON), a choice or None; the modality must fit the slot."""
    if value is None:
        return None
    if isinstance(value, str) or (callable(value) and not isinstance(value, type)):
        value = EncoderChoice(value)
    elif isinstance(value, Mapping):
        known = [f.name for f in fields(EncoderChoice)]
        if unknown := [key for key in value if key not in known]:
            msg = f"{slot} has no entry {unknown[0]!r}. {did_you_mean(unknown[0], known)}"
            raise InputError(msg)
        if "name" not in value:
            msg = f"{slot} needs the 'name' of an encoder, got {dict(value)}."
            raise InputError(msg)
        value = EncoderChoice(**value)
    if not isinstance(value, EncoderChoice):
        msg = f"{slot} takes the name of an encoder, a mapping or an EncoderChoice, got {type(value).__name__}."
        raise WrongTypeError(msg)
    if value.modality != modality:
        msg = f"{slot} needs an encoder of {modality}s, and {value.name!r} reads {value.modality}s."
        raise InputError(msg)
    return value


def check_saveable(config: Any) -> None:
    """Refuse to save a model with an encoder that no name stands for.

    Parameters
    ----------
    config
        Configuration of a model.
    """
    for slot in fields(config):
        choice = getattr(config, slot.name)
        if isinstance(choice, EncoderChoice) and not isinstance(choice.name, str):
            msg = (
                f"{slot.name} is a callable, which cannot be written to a file. Register it under a name "
                "(stfm.encoders.ENCODERS.register(name, EncoderSpec(...))) and make the model with that name."
            )
            raise InputError(msg)


def published_inside(config: Any) -> dict[str, EncoderSpec]:
    """Return the encoders whose published weights a model was made with, by slot; it passes them on when it is shared.

    Parameters
    ----------
    config
        Configuration of a model.
    """
    choices = {slot.name: getattr(config, slot.name) for slot in fields(config)}
    return {
        slot: choice.spec
        for slot, choice in choices.items()
        if isinstance(choice, EncoderChoice) and choice.spec.source == "published"
        if choice.weights is not None or choice.options.get("pretrained")
    }


def build_image(choice: EncoderChoice, *, pretrained: bool) -> ImageEncoder:
    """Return the image encoder of a slot."""
    return _build(choice, None, pretrained=pretrained)  # type: ignore[return-value]


def build_gene(choice: EncoderChoice, vocabulary: Vocabulary | None, *, pretrained: bool) -> GeneEncoder:
    """Return the gene encoder of a slot, told which genes it will see."""
    if vocabulary is None:
        msg = (
            f"Gene encoder {choice.name!r} needs a vocabulary: create(name, vocabulary), for example of "
            "Vocabulary.from_panels([slide.panel])."
        )
        raise InputError(msg)
    encoder: GeneEncoder = _build(choice, vocabulary, pretrained=pretrained)  # type: ignore[assignment]
    return encoder.bind(vocabulary) if pretrained else encoder


def _build(choice: EncoderChoice, vocabulary: Vocabulary | None, *, pretrained: bool) -> Encoder:
    if pretrained and choice.weights is None and choice.spec.source == "published":
        msg = (
            f"Encoder {choice.name!r} starts from random weights: its published checkpoint is not part of stfm. "
            f"Give your own copy in the configuration: {{'name': {choice.name!r}, 'weights': 'file.safetensors'}}."
        )
        warnings.warn(msg, StfmWarning, stacklevel=6)
    return build_encoder(
        choice.name,
        n_genes=None if vocabulary is None else len(vocabulary),
        mode=choice.mode,
        weights=choice.weights if pretrained else None,
        options=choice.options,
        lora_rank=choice.lora_rank,
        on_mpp=choice.on_mpp,
    )


def fit_gene_encoder(encoder: GeneEncoder, slides: Sequence[SlideInputs], *, niche: bool) -> None:
    """Fit scales and components on the spots (or niches) of the training slides, evenly sampled.

    Parameters
    ----------
    encoder
        Encoder of the slot; nothing happens where it takes nothing from data.
    slides
        Training slides; those without counts are left out.
    niche
        Take the niche's mean counts instead of the spot's.
    """
    slides = [s for s in slides if s.has_gene]
    if not encoder.needs_fit or not slides:
        return
    values: list[Tensor] = []
    masks: list[Tensor] = []
    for slide, index in sample_spots(slides, fit_limit(encoder.n_genes)):
        dense = slide.niche_expression(index) if niche else slide.expression(index)
        values.append(torch.from_numpy(dense))
        measured = np.ones(encoder.n_genes, dtype=bool) if slide.match is None else slide.match.mask
        masks.append(torch.from_numpy(np.asarray(measured, dtype=bool)).expand(len(index), -1))
    mask = torch.cat(masks)
    device = next(encoder.buffers()).device
    # On the CPU: sums of many values are taken in 64 bits, which not every device has.
    encoder.cpu().fit(torch.cat(values), None if bool(mask.all()) else mask)
    encoder.to(device)


def check_batch(batch: Batch, *, training: bool) -> None:
    """Refuse a training batch of one spot, whose loss says nothing."""
    if training and len(batch) < 2:
        msg = f"A contrastive loss needs at least 2 spots a batch in training, got {len(batch)}; raise batch_size."
        raise InputError(msg)
