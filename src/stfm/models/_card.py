"""The model card that is written beside every saved model, and what a person adds to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from stfm._errors import InputError
from stfm._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from stfm.encoders.spec import EncoderSpec

__all__ = ["About", "licences", "model_card"]

_TAGS = ("spatial-transcriptomics", "histopathology", "multimodal", "biology")


@dataclass
class About:
    """What a model card says beside what training recorded.

    Attributes
    ----------
    name
        Heading of the card; the family where it is empty.
    licence
        Of the weights, as the hub writes it (``"bsd-3-clause"``); left out where it is empty.
    text
        What the model is for, and what it has not seen: Markdown, without headings of the first two levels.
    results
        Protocol -> metric -> value, as :func:`stfm.metrics.protocols` names protocols.
    """

    name: str = ""
    licence: str = ""
    text: str = ""
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse results that are no numbers by protocol and metric."""
        for protocol, row in self.results.items():
            if not isinstance(row, dict) or not all(isinstance(value, Real) for value in row.values()):
                msg = f"about.results[{protocol!r}] must map metrics to numbers, got {row!r}."
                raise InputError(msg)


def model_card(
    family: str,
    *,
    n_parameters: int,
    n_genes: int,
    config: Mapping[str, Any],
    seen: Mapping[str, Any],
    history: pd.DataFrame | None,
    about: About | None = None,
    dtype: str = "fp32",
    inside: Mapping[str, EncoderSpec] | None = None,
) -> str:
    """Return a card in Markdown: what the model is, what it saw, what it reached.

    Parameters
    ----------
    family
        Of the model.
    n_parameters, n_genes
        Its size, and that of its vocabulary.
    config
        Its configuration.
    seen
        What training recorded: studies, patients, slides, platforms, species, spots, recipe, models adapted from.
    history
        A row an epoch.
    about
        What a person adds.
    dtype
        How the weights are stored.
    inside
        Encoders whose published weights it holds, by slot.
    """
    about = about or About()
    lines = [
        *_front_matter(family, about),
        f"# {about.name or family} ({n_parameters:,} parameters)",
        "",
        f"A `{family}` model, saved by stfm {__version__} ({dtype}). Load it with `stfm.models.load(folder)`.",
        "",
        *_adapted(seen.get("adapted_from", [])),
        *([about.text.strip(), ""] if about.text.strip() else []),
        "## What it saw",
        "",
        *(f"* {what}: {_names(seen.get(what))}" for what in ("studies", "patients", "slides", "platforms", "species")),
        f"* spots: {seen['n_spots']:,}; genes: {n_genes or 'none'}",
        "",
        "Numbers measured on any of these are not numbers of generalisation.",
        "",
        *_results(about.results),
        *_inside(inside or {}),
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


def _front_matter(family: str, about: About) -> list[str]:
    """Return the YAML by which the hub finds and files a model."""
    licence = [f"license: {json.dumps(about.licence)}"] if about.licence else []
    return ["---", "library_name: stfm", *licence, "tags:", *(f"- {tag}" for tag in (*_TAGS, family)), "---", ""]


def _adapted(models: Sequence[Mapping[str, str]]) -> list[str]:
    """Return which trained models it was made from, the latest first."""
    if not models:
        return []
    said = (f"{one['name']} (weights sha256 `{one['weights_sha256']}`)" for one in reversed(models))
    return [f"Adapted from {', itself adapted from '.join(said)}.", ""]


def _names(names: list[str] | None) -> str:
    return ", ".join(names) if names else "not recorded"


def _results(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table: a row a protocol, a column a metric."""
    if not results:
        return []
    metrics = list(dict.fromkeys(metric for row in results.values() for metric in row))
    rows = [
        f"| {protocol} | {' | '.join(f'{row[metric]:.4g}' if metric in row else '' for metric in metrics)} |"
        for protocol, row in results.items()
    ]
    head = [f"| protocol | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    return ["## Numbers", "", *head, *rows, ""]


def licences(inside: Mapping[str, EncoderSpec]) -> list[str]:
    """Return each encoder once, with the licence of its weights.

    Parameters
    ----------
    inside
        Encoders by slot.
    """
    said = (f"{spec.name} ({spec.licence or 'licence not stated'}{', gated' * spec.gated})" for spec in inside.values())
    return list(dict.fromkeys(said))


def _inside(inside: Mapping[str, EncoderSpec]) -> list[str]:
    """Return whose weights it holds."""
    if not inside:
        return []
    rows = [f"* {name}" for name in licences(inside)]
    return ["## Weights of others", "", "It was made with these weights, whose licences go on:", "", *rows, ""]


def _training(history: pd.DataFrame | None, recipe: Mapping[str, Any]) -> list[str]:
    if history is None or history.empty:
        return ["Not trained: weights are as they were initialised or loaded."]
    last = history.dropna(axis=1, how="all").iloc[-1]
    shown = [f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, (int, float))]
    return [f"Last epoch: {', '.join(shown)}.", "", f"Recipe: `{json.dumps(recipe, default=str)}`"]
