"""Checks of arguments that every floor shares; each says what was expected and what came."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError, WrongTypeError
from stfm._keys import LIBRARY_COLUMNS, PATIENT, SPATIAL, STUDY, UNS

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(value: str, options: Iterable[str], *, also: Iterable[str] = ()) -> str:
    """Return a sentence that names the nearest options, or all of them when none is near.

    Parameters
    ----------
    value
        What was given.
    options
        What there is.
    also
        Names that are told where they are near, and not among all.
    """
    options = sorted(options)
    near = difflib.get_close_matches(value.lower(), [*options, *also], n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"There are: {', '.join(repr(o) for o in options)}." if options else "There are none."


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        msg = f"{name}={value!r} is unknown. {did_you_mean(str(value), choices)}"
        raise InputError(msg)
    return value


def check_key(name: str, value: str, *, taken: Iterable[str | None] = ()) -> None:
    """Refuse what cannot name a result: no string, an empty one, or the name of what is read.

    Parameters
    ----------
    name
        Of the argument.
    value
        What was given.
    taken
        Names of the call beside the usual ones of coordinates, libraries, patients and studies; None is passed over.
    """
    if not isinstance(value, str):
        msg = f"{name} must be a string, got {type(value).__name__}."
        raise WrongTypeError(msg)
    if not value:
        msg = f"{name} is empty; give the result a name."
        raise InputError(msg)
    if value in {SPATIAL, UNS, PATIENT, STUDY, *LIBRARY_COLUMNS, *taken}:
        msg = (
            f"{name}={value!r} is where stfm reads coordinates, images, libraries or patients, which the result would "
            "overwrite; give it another name."
        )
        raise InputError(msg)


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not finite and greater than zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        msg = f"{name} must be a number, got {type(value).__name__}."
        raise WrongTypeError(msg)
    if not np.isfinite(value) or value <= 0:
        msg = f"{name} must be a finite number greater than 0, got {value}."
        raise InputError(msg)


def check_count(name: str, value: int, *, minimum: int = 1) -> None:
    """Refuse what is not an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        msg = f"{name} must be an integer, got {type(value).__name__} ({value!r})."
        raise WrongTypeError(msg)
    if value < minimum:
        msg = f"{name} must be at least {minimum}, got {value}."
        raise InputError(msg)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside the closed interval from ``low`` to ``high``."""
    if not (low <= value <= high):
        msg = f"{name} must lie between {low} and {high}, got {value}."
        raise InputError(msg)


def resolve_rng(rng: int | np.random.Generator | None) -> np.random.Generator:
    """Return a generator from a seed, a generator (used as it is) or ``None`` (fresh entropy)."""
    return np.random.default_rng(rng)
