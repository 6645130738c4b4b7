"""Encoders by name."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from stfm._errors import InputError, WrongTypeError
from stfm._validate import did_you_mean
from stfm.encoders.base import Encoder
from stfm.encoders.registry import ENCODERS
from stfm.encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["build_encoder"]


def build_encoder(
    name: str | EncoderSpec | Encoder,
    *,
    n_genes: int | None = None,
    mode: str | None = None,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    lora_rank: int = 8,
) -> Encoder:
    """Return an encoder.

    Parameters
    ----------
    name
        A name of :func:`list_encoders`, a spec, or an encoder (returned as it is, in the mode asked for).
    n_genes
        Length of the vocabulary; gene encoders need it.
    mode
        ``"full"``, ``"frozen"`` or ``"lora"``; the row's own by default.
    weights
        A checkpoint in the published layout: a file or a state dict. Without it the weights are random.
    options
        Arguments of the family (widths, stem, tokens ...), over those of the row.
    lora_rank
        Rank of the low-rank additions of ``mode="lora"``.

    Returns
    -------
    :class:`ImageEncoder` or :class:`GeneEncoder`.

    Raises
    ------
    MissingKeyError
        No such encoder.
    InputError
        An option that the family does not have, or ``n_genes`` missing.
    """
    if isinstance(name, Encoder):
        return name if mode is None else name.set_mode(mode)
    spec = ENCODERS.get(name) if isinstance(name, str) else name
    if not isinstance(spec, EncoderSpec):
        msg = f"An encoder is a name, an EncoderSpec or an Encoder, got {type(name).__name__}."
        raise WrongTypeError(msg)
    factory = _factory(spec.factory)
    arguments = {**spec.options, **(options or {})}
    known = [p for p in inspect.signature(factory).parameters if p not in ("spec", "n_genes")]
    for option in arguments:
        if option not in known:
            msg = f"Encoder {spec.name!r} has no option {option!r}. {did_you_mean(option, known)}"
            raise InputError(msg)
    if spec.modality == "gene":
        if n_genes is None:
            msg = f"Gene encoder {spec.name!r} needs n_genes, the length of the vocabulary."
            raise InputError(msg)
        arguments["n_genes"] = n_genes
    encoder = factory(spec, **arguments)
    if weights is not None:
        encoder.load_weights(weights)
    return encoder.set_mode(mode or spec.mode, lora_rank=lora_rank)


def _factory(path: str) -> Callable[..., Encoder]:
    module, _, function = path.partition(":")
    return cast("Callable[..., Encoder]", getattr(import_module(module), function))
