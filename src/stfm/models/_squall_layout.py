"""Reads your own copy of SQUALL's checkpoint into the multi-branch STORM; no weights are part of stfm.

The shapes follow from the published configuration, whose number of parameters this architecture meets exactly. That
queries, keys and values are one matrix, that patches are cut by convolutions and that un-patchify is a plain reshape is
known of the public code; the names of the parameters are not, and those below are what such code usually says. Where a
file says otherwise, ``names=`` translates: regular expressions of its names, and what they are to be read as.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from stfm._errors import DataIntegrityError, InputError
from stfm.weights.state import read_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from stfm.models._multibranch_network import TissueNetwork

__all__ = ["expected_shapes", "read_published"]

_EXPERTS = {"0": "_rgb", "1": "_expr"}
_LAYERS = {"0": "fc1", "3": "fc2"}
_DECODERS = {"gene_decoder": "decoder_expr", "image_decoder": "decoder_rgb"}
_GENES = ("learned", "paired")
_FITTED = (*_GENES, "residual", "pixel_mean", "pixel_scale", "expression.scaler.mean", "expression.scaler.scale")
_SHOWN = 3
_START = {
    "image_patch.": ("encoder.patch_embed_rgb.proj.", "patches"),
    "expression.genes.": ("encoder.patch_embed_expr.conv.", "point"),
    "expression.patch.": ("encoder.patch_embed_expr.proj.", "bins"),
    "position.": ("encoder.pos_embed.", "same"),
    "encoder.norm.": ("encoder.norm.", "same"),
}


def expected_shapes(model: TissueNetwork) -> dict[str, tuple[int, ...]]:
    """Return the names that a checkpoint must have (after ``names=``), and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in _weights(model).items():
        public, kind = _public(name, model)
        shapes[public] = _public_shape(tuple(tensor.shape), kind, model)
    return shapes


def read_published(model: TissueNetwork, path: str | Path, *, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a state dict of the model from a checkpoint in the published layout; the model is only looked at."""
    config = model.config
    if config.mode == "lora":
        msg = "Load the weights into a model of mode='full', then take model.adapted('lora')."
        raise InputError(msg)
    if not config.legacy_reshape:
        msg = (
            "The published weights were trained with a plain reshape for un-patchify; make the model with "
            "create('storm-multibranch', genes, legacy_reshape=True)."
        )
        raise InputError(msg)
    state = _renamed(read_state(path), names, path)
    _check(state, expected_shapes(model), path, n_genes=model.expression.n_genes)
    out: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        if name in _FITTED:
            out[name] = torch.ones_like(own) if name in _GENES else own
            continue
        public, kind = _public(name, model)
        out[name] = _converted(state[public], kind).to(own.dtype)
    return out


def _weights(model: TissueNetwork) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name not in _FITTED}


def _public(name: str, model: TissueNetwork) -> tuple[str, str]:
    """Return the published name of one of our parameters, and how it is stored there."""
    for start, (public, kind) in _START.items():
        if name.startswith(start):
            return public + name.removeprefix(start), kind if name.endswith("weight") else "same"
    part, _, rest = name.partition(".")
    prefix = _DECODERS.get(part, "encoder")
    if rest.startswith(("out.", "genes.")):
        inner, _, last = rest.partition(".")
        kind = "point" if inner == "genes" and last == "weight" else "same"
        return f"{prefix}.{'head' if inner == 'out' else 'conv'}.{last}", kind
    rest = rest.removeprefix("stack.")
    if not rest.startswith("blocks."):
        return f"{prefix}.{rest}", "same"
    _, number, inner = rest.split(".", 2)
    shared = prefix != "encoder" or int(number) >= model.config.specific
    tail, kind = _block(inner, shared=shared)
    return f"{prefix}.blocks.{number}.{tail}", kind


def _block(inner: str, *, shared: bool) -> tuple[str, str]:
    """Return the published name of a parameter within a block."""
    parts = inner.split(".")
    if parts[0] == "bias":
        return f"attn.rel_bias.{parts[2]}.{parts[3]}", "same"
    kind, last = parts[1], parts[-1]
    if kind == "norms":
        return f"norm1.{last}", "same"
    if kind == "attention":
        return (f"attn.proj.{last}", "same") if parts[2] == "out" else (f"attn.qkv.{last}", parts[2])
    suffix = "" if shared else _EXPERTS[parts[2]]
    if kind == "expert_norms":
        return f"norm2{suffix}.{last}", "same"
    return f"mlp{suffix}.{_LAYERS[parts[3]]}.{last}", "same"


def _public_shape(shape: tuple[int, ...], kind: str, model: TissueNetwork) -> tuple[int, ...]:
    config = model.config
    if kind in ("q", "k", "v"):
        return (3 * shape[0], *shape[1:])
    if kind == "point":
        return (*shape, 1, 1)
    if kind in ("patches", "bins"):
        side = config.patch_px if kind == "patches" else config.cells
        return (shape[0], shape[1] // side**2, side, side)
    return shape


def _converted(tensor: Tensor, kind: str) -> Tensor:
    """Return a published tensor as ours is stored."""
    if kind in ("q", "k", "v"):
        return tensor.chunk(3)["qkv".index(kind)].clone()
    if kind == "point":
        return tensor[:, :, 0, 0]
    if kind in ("patches", "bins"):
        return tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
    return tensor


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str], path: str | Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in names.items():
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                msg = f"names= holds {pattern!r}, which is no regular expression ({error})."
                raise InputError(msg) from error
        if new in out:
            msg = f"{path}: with names=, {name!r} and another tensor are both called {new!r}."
            raise InputError(msg)
        out[new] = tensor
    return out


def _check(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: str | Path, *, n_genes: int
) -> None:
    """Refuse a file whose names or shapes differ from what is expected."""
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        parts = [
            f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
            for what, found in (("missing", missing), ("unknown", unknown))
            if found
        ]
        msg = (
            f"{path} is not in the published layout: names are {'; '.join(parts)}. If it is a checkpoint of SQUALL "
            "whose parameters have other names, translate them with names={pattern: replacement}."
        )
        raise DataIntegrityError(msg)
    genes = tuple(state["encoder.patch_embed_expr.conv.weight"].shape)
    if len(genes) > 1 and genes[1] != n_genes:
        msg = (
            f"{path} reads {genes[1]:,} genes, the model's vocabulary has {n_genes:,}; make the model with the "
            "checkpoint's own genes, in their order."
        )
        raise DataIntegrityError(msg)
    wrong = [name for name, shape in expected.items() if tuple(state[name].shape) != shape]
    if wrong:
        first = wrong[0]
        msg = (
            f"{path} has other sizes than the model: {len(wrong)} tensors differ, {first} first "
            f"({tuple(state[first].shape)}, expected {expected[first]})."
        )
        raise DataIntegrityError(msg)
    if odd := [name for name in expected if not torch.isfinite(state[name]).all()]:
        msg = f"{path} holds nan or infinite numbers, in {odd[0]} first; fetch it again."
        raise DataIntegrityError(msg)
