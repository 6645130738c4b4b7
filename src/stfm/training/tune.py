"""What of a trained model is trained further: all of it, its heads, or low-rank additions."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from stfm._errors import InputError
from stfm._optional import require
from stfm.nn.attention import Attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stfm.models.base import Model
    from stfm.training.recipes import Recipe

__all__ = ["check_tune", "tuned", "tuned_stages"]

_ADAPTER = "default"


def check_tune(model: Model, tune: str) -> None:
    """Refuse what a model cannot be adapted by."""
    if tune == "full":
        return
    if model.tuned_parts is None:
        msg = (
            f"tune={tune!r} is for models with decoders (storm, storm-multibranch); a {model.family!r} model is tuned "
            "in full, with encoders as the mode= of their EncoderChoice says."
        )
        raise InputError(msg)
    mode = getattr(model.config, "mode", "full")
    if mode != "full":
        msg = f"the model is adapted already (mode={mode!r}), so tune={tune!r} has no place; leave tune= out."
        raise InputError(msg)
    if tune == "lora":
        require("peft", extra="lora")


def tuned_stages(model: Model, tune: str) -> tuple[str, ...]:
    """Return the stages in which there is something to train."""
    if tune != "head" or model.tuned_parts is None:
        return model.stages
    return tuple(stage for stage in model.stages if stage in model.tuned_parts.heads)


@contextmanager
def tuned(model: Model, recipe: Recipe, *, seed: int = 0) -> Iterator[Callable[[], None]]:
    """Adapt a model for the length of a training run.

    Low-rank additions are made by ``peft`` and merged into the weights at the end, so that the model is again a plain
    one, which is saved and loaded as any other.

    Parameters
    ----------
    model
        The model, changed in place.
    recipe
        Says what is tuned (``tune``), and rank and scale of the additions.
    seed
        Of the additions' first weights.

    Yields
    ------
    A function to call when the model's stage was set: it freezes what is not tuned.
    """
    check_tune(model, recipe.tune)
    parts = model.tuned_parts
    if recipe.tune == "full" or parts is None:
        yield lambda: None
        return
    heads = tuple(prefix for prefixes in parts.heads.values() for prefix in prefixes)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    root = cast("nn.Module", getattr(model, parts.blocks))
    adapted = _add_low_rank(root, recipe, seed) if recipe.tune == "lora" else None

    def restrict() -> None:
        for name, p in model.named_parameters():
            low = adapted is not None and name.startswith(f"{parts.blocks}.") and ".lora_" in name
            p.requires_grad_(low or (p.requires_grad and name.startswith(heads)))

    try:
        yield restrict
    finally:
        if adapted is not None:
            adapted.merge_and_unload(progressbar=False)
            vars(root).pop("peft_config", None)
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
        if model.stage is not None:
            model.stage = model.stage


def _add_low_rank(root: nn.Module, recipe: Recipe, seed: int) -> Any:
    """Put low-rank additions beside the maps to queries and values of every attention below ``root``."""
    peft = require("peft", extra="lora")
    names = [name for name, part in root.named_modules() if isinstance(part, Attention)]
    config = peft.LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=[f"{n}.{m}" for n in names for m in "qv"]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.LoraModel(root, config, _ADAPTER)
