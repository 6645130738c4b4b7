"""The model card that is written beside every saved model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stfm._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


def model_card(
    family: str,
    *,
    n_parameters: int,
    n_genes: int,
    config: Mapping[str, Any],
    seen: Mapping[str, Any],
    history: pd.DataFrame | None,
) -> str:
    """Return a card in Markdown: what the model is, what it saw, what it reached."""
    lines = [
        f"# {family} ({n_parameters:,} parameters)",
        "",
        f"Saved by stfm {__version__}. Load it with `stfm.models.load(folder)`.",
        "",
        "## What it saw",
        "",
        f"* studies: {_names(seen['studies'])}",
        f"* patients: {_names(seen['patients'])}",
        f"* slides: {_names(seen['slides'])}",
        f"* spots: {seen['n_spots']:,}; genes: {n_genes or 'none'}",
        "",
        "Numbers measured on any of these are not numbers of generalisation.",
        "",
        "## Training",
        "",
        *_training(history, seen["recipe"]),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=1, default=str),
        "```",
        "",
    ]
    return "\n".join(lines)


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "not recorded"


def _training(history: pd.DataFrame | None, recipe: Mapping[str, Any]) -> list[str]:
    if history is None or history.empty:
        return ["Not trained: weights are as they were initialised or loaded."]
    last = history.dropna(axis=1, how="all").iloc[-1]
    shown = [f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, (int, float))]
    return [f"Last epoch: {', '.join(shown)}.", "", f"Recipe: `{json.dumps(recipe, default=str)}`"]
