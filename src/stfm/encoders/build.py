"""Encoders by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from stfm._errors import InputError, WrongTypeError
from stfm._validate import check_count, did_you_mean
from stfm.encoders.base import Encoder, ImageEncoder
from stfm.encoders.checkpoint import check_found
from stfm.encoders.registry import ENCODERS, custom_spec
from stfm.encoders.spec import INPUT_FIELDS, EncoderSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["build_encoder"]

#: counts whose default says nothing of them
_COUNTS = ("hidden", "max_genes", "n_rows")
#: the least of those that are not 1
_LEAST = {"registers": 0, "histology": 0, "n_bins": 2, "max_length": 2, "n_ids": 4}


def build_encoder(
    name: str | EncoderSpec | Encoder | Callable[[Tensor], Tensor],
    *,
    n_genes: int | None = None,
    mode: str | None = None,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    lora_rank: int = 8,
    on_mpp: str | None = None,
) -> Encoder:
    """Return an encoder.

    Parameters
    ----------
    name
        A name of :func:`list_encoders`; ``"timm:<model>"`` for any model of timm; a spec; an encoder (returned as it
        is, in the mode asked for); or any callable, tiles ``(b, 3, h, w)`` -> features ``(b, f)``, whose width is found
        by one probe. A callable reads values in 0..1 as they come unless ``options`` give ``input_px``, ``mean``, ...
    n_genes
        Length of the vocabulary; gene encoders need it.
    mode
        ``"full"``, ``"frozen"`` or ``"lora"``; the row's own by default.
    weights
        A checkpoint in a published layout: a file, a state dict, a URL, ``"hub:owner/repository/file"``, or ``"hub"``
        for the repository that the row names. Without it the weights are random.
    options
        Arguments of the family (pooling, stages, depth, stem, tokens ...) and of the preparation of images
        (``input_px``, ``resize_px``, ``mpp``, ``mean``, ``std``, ``interpolation``), over those of the row.
    lora_rank
        Rank of the low-rank additions of ``mode="lora"``.
    on_mpp
        What an image encoder does with tiles at another µm/px than its own: ``"resample"`` (the default), ``"error"``
        or ``"ignore"``; :func:`stfm.encoders.fit_scale` explains them.

    Returns
    -------
    :class:`ImageEncoder` or :class:`GeneEncoder`.

    Raises
    ------
    MissingKeyError
        No such encoder.
    InputError
        An option that the family does not have, a size or count that no network has, or ``n_genes`` missing.
    MissingDependencyError
        ``"timm:<model>"`` without timm.
    """
    if isinstance(name, Encoder):
        return _used(name if mode is None else name.set_mode(mode), on_mpp)
    if isinstance(name, str):
        spec = ENCODERS.get(name)
    elif isinstance(name, EncoderSpec):
        spec = name
    elif callable(name) and not isinstance(name, type):
        spec = custom_spec(name)
    else:
        msg = f"An encoder is a name, an EncoderSpec, an Encoder or a callable, got {type(name).__name__}."
        raise WrongTypeError(msg)
    factory = _factory(spec.factory)
    spec, arguments = _settled(spec, options or {}, factory)
    if spec.modality == "gene":
        if n_genes is None:
            msg = f"Gene encoder {spec.name!r} needs n_genes, the length of the vocabulary."
            raise InputError(msg)
        check_count("n_genes", n_genes)
        arguments["n_genes"] = n_genes
    if callable(name):
        arguments["function"] = name
    if weights is not None and weights != "hub":
        check_found(weights)
    encoder = factory(spec, **arguments)
    if weights is not None:
        encoder.load_weights(_place(encoder.spec, weights))
    return _used(encoder.set_mode(mode or spec.mode, lora_rank=lora_rank), on_mpp)


def _settled(
    spec: EncoderSpec, options: Mapping[str, Any], factory: Callable[..., Encoder]
) -> tuple[EncoderSpec, dict[str, Any]]:
    """Return the spec with the options in it, and the arguments of the factory."""
    parameters = inspect.signature(factory).parameters
    known = [
        p
        for p, kind in parameters.items()
        if p not in ("spec", "n_genes", "function") and kind.kind.name != "VAR_KEYWORD"
    ]
    any_goes = any(kind.kind.name == "VAR_KEYWORD" for kind in parameters.values())
    fields = [f for f in INPUT_FIELDS if spec.modality == "image" and f != "pooling"]
    for option in options:
        if option not in (*known, *fields) and not any_goes:
            msg = f"Encoder {spec.name!r} has no option {option!r}. {did_you_mean(option, [*known, *fields])}"
            raise InputError(msg)
    changed: dict[str, Any] = {name: value for name, value in options.items() if name in fields}
    arguments = {**spec.options, **{name: value for name, value in options.items() if name not in fields}}
    if spec.factory.startswith("stfm."):  # what the options of others mean, they know
        _check_counts(spec.name, arguments, parameters)
    return replace(spec, **changed, options=arguments), dict(arguments)


def _check_counts(name: str, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse sizes and counts that no network has; which of them must divide another, the families check.

    What is counted has a whole number for its default, or several of them, a stage each.
    """
    for option, value in arguments.items():
        default = parameters[option].default if option in parameters else None
        what = f"Encoder {name!r}: {option}"
        if isinstance(default, tuple):
            several = isinstance(value, Sequence) and not isinstance(value, str)
            if not several or not (len(value) or option == "hidden"):
                msg = f"{what} must be a list of whole numbers, one a stage; got {value!r}."
                raise InputError(msg)
        elif type(default) is not int and (option not in _COUNTS or value is None):
            continue
        for one in value if isinstance(default, tuple) else [value]:
            check_count(what, one, minimum=_LEAST.get(option, 1))


def _place(spec: EncoderSpec, weights: str | Path | Mapping[str, Tensor]) -> str | Path | Mapping[str, Tensor]:
    if not (isinstance(weights, str) and weights == "hub"):
        return weights
    if not spec.remote:
        place = f"hub:{spec.hub or 'owner/repo'}/file"
        msg = f"No file on the Hugging Face hub is known for encoder {spec.name!r}; give weights={place!r}."
        raise InputError(msg)
    return spec.remote


def _used(encoder: Encoder, on_mpp: str | None) -> Encoder:
    """Return the encoder with its policy about other scales."""
    if on_mpp is not None and isinstance(encoder, ImageEncoder):
        return encoder.set_on_mpp(on_mpp)
    return encoder


def _factory(path: str) -> Callable[..., Encoder]:
    module, _, function = path.partition(":")
    return cast("Callable[..., Encoder]", getattr(import_module(module), function))
