"""Which slides are held out for validation: whole patients or whole sections, never spots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_choice, did_you_mean
from stfm.metrics.splits import check_leakage

if TYPE_CHECKING:
    from stfm.slide.slide import Slide

__all__ = ["Validation", "split_slides"]

#: how the validation slides are chosen; the names of slides or patients choose them one by one
Validation: TypeAlias = Literal["auto", "patient", "section"] | float | Sequence[str] | None

_BY = ("auto", "patient", "section")


def split_slides(
    slides: Sequence[Slide], validation: Validation = "auto", *, fraction: float = 0.2, seed: int = 0
) -> tuple[list[Slide], list[Slide]]:
    """Split slides into training and validation.

    Parameters
    ----------
    slides
        All slides.
    validation
        ``"patient"``: whole patients are held out. ``"section"``: whole slides, also where another slide of the same
        patient is trained on. ``"auto"``: patients if at least two are known, else sections if there are at least two,
        else nothing. A number: the share held out, as ``"auto"`` does. A list: these slides or patients. ``None``:
        nothing.
    fraction
        Share of the patients or sections held out, at least one of them.
    seed
        Seed of the choice.

    Returns
    -------
    Training slides and validation slides, in their order; the second may be empty.

    Raises
    ------
    InputError
        Nothing would be left on one side, a patient is unknown or would be on both sides, or a name does not exist.
    """
    slides = list(slides)
    if validation is None:
        return slides, []
    if isinstance(validation, Sequence) and not isinstance(validation, str):
        return _by_name(slides, [str(name) for name in validation])
    if isinstance(validation, (int, float)):
        if not 0 < validation < 1:
            msg = f"validation must be a share between 0 and 1, got {validation}; None trains without validation."
            raise InputError(msg)
        fraction, by = float(validation), "auto"
    else:
        by = check_choice("validation", validation, _BY)
    if by == "auto":
        finest = _finest(slides)
        if finest is None:
            return slides, []
        by = finest
    groups = _groups(slides, by)
    held = _draw(groups, fraction, by, seed)
    train = [s for s, group in zip(slides, groups, strict=True) if group not in held]
    return train, [s for s, group in zip(slides, groups, strict=True) if group in held]


def _finest(slides: list[Slide]) -> str | None:
    known = {s.patient for s in slides}
    if None not in known and len(known) >= 2:
        return "patient"
    # Sections of one patient only: a weaker test, but the only one there is.
    return "section" if len(slides) >= 2 else None


def _groups(slides: list[Slide], by: str) -> list[str]:
    if by == "section":
        return [s.name for s in slides]
    unknown = [s.name for s in slides if s.patient is None]
    if unknown:
        msg = (
            f"validation='patient' needs the patient of every slide, which slide {unknown[0]!r} lacks: "
            "give patient_key=, or validation='section'."
        )
        raise InputError(msg)
    return [str(s.patient) for s in slides]


def _draw(groups: list[str], fraction: float, by: str, seed: int) -> set[str]:
    names = sorted(set(groups))
    if len(names) < 2:
        msg = f"There is one {by} only ({names[0]!r}), so none can be held out: give more data, or validation=None."
        raise InputError(msg)
    n_held = min(max(round(fraction * len(names)), 1), len(names) - 1)
    return set(np.random.default_rng(seed).permutation(names)[:n_held].tolist())


def _by_name(slides: list[Slide], names: list[str]) -> tuple[list[Slide], list[Slide]]:
    known = {s.name for s in slides} | {s.patient for s in slides if s.patient is not None}
    if unknown := [name for name in names if name not in known]:
        msg = f"validation names {unknown[0]!r}, which is no slide or patient. {did_you_mean(unknown[0], known)}"
        raise InputError(msg)
    held = [s for s in slides if s.name in names or s.patient in names]
    train = [s for s in slides if not (s.name in names or s.patient in names)]
    if not train or not held:
        msg = "validation leaves no slide to train on." if not train else "validation is an empty list; use None."
        raise InputError(msg)
    sides = [[s.patient for s in side if s.patient is not None] for side in (train, held)]
    if all(sides):
        check_leakage(*sides)
    return train, held
