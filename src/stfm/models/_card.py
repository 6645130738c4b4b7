"""The model card that is written beside every saved model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from stfm._version import __version__

if TYPE_CHECKING:
    from stfm.models.base import Model


def model_card(model: Model) -> str:
    """Return a card in Markdown: what the model is, what it saw, what it reached."""
    seen = model.seen
    genes = "none" if model.vocabulary is None else f"{len(model.vocabulary):,}"
    lines = [
        f"# {model.family} ({model.n_parameters:,} parameters)",
        "",
        f"Saved by stfm {__version__}. Load it with `stfm.models.load(folder)`.",
        "",
        "## What it saw",
        "",
        f"* studies: {_names(seen.studies)}",
        f"* patients: {_names(seen.patients)}",
        f"* slides: {_names(seen.slides)}",
        f"* spots: {seen.n_spots:,}; genes: {genes}",
        "",
        "Numbers measured on any of these are not numbers of generalisation.",
        "",
        "## Training",
        "",
        *_training(model),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(asdict(model.config), indent=1, default=str),
        "```",
        "",
    ]
    return "\n".join(lines)


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "not recorded"


def _training(model: Model) -> list[str]:
    if model.history is None or model.history.empty:
        return ["Not trained: weights are as they were initialised or loaded."]
    last = model.history.dropna(axis=1, how="all").iloc[-1]
    shown = [f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, (int, float))]
    recipe = json.dumps(model.seen.recipe, default=str)
    return [f"Last epoch: {', '.join(shown)}.", "", f"Recipe: `{recipe}`"]
