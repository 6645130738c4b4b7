"""Which slides and patients of a target a model has been trained on: a number measured there is no test."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stfm._errors import InputError, StfmWarning
from stfm._keys import UNNAMED
from stfm.metrics.splits import check_leakage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.slide.slide import Slide

FIELDS = ("studies", "slides", "patients")


@dataclass(frozen=True)
class Exposure:
    """What of a target was seen in training.

    Attributes
    ----------
    libraries
        Names of the target's libraries.
    slides, patients
        Whether each of them, or its patient, was among the training slides.
    words
        One sentence a kind that was seen; empty where nothing was.
    """

    libraries: tuple[str, ...]
    slides: tuple[bool, ...]
    patients: tuple[bool, ...]
    words: tuple[str, ...]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the entries of ``uns``: a value a library."""
        return {
            "libraries": list(self.libraries),
            "seen_in_training": list(self.slides),
            "patient_seen_in_training": list(self.patients),
        }

    def warn(self, *, stacklevel: int) -> None:
        """Warn once of everything that was seen."""
        if self.words:
            new = "tissue" if any(self.slides) else "patients"
            msg = (
                f"{' '.join(self.words)} A correlation with these counts tells nothing about other {new}; it is marked "
                "in uns and in plots."
            )
            warnings.warn(msg, StfmWarning, stacklevel=stacklevel + 1)


def exposure(slides: Sequence[Slide], *sources: Any) -> Exposure:
    """Compare a target with what models saw: their ``seen``, mapping or object, with ``FIELDS``.

    Slides that nobody named are not compared. Where both sides name their studies, names are compared within a study
    only: patient ``A`` of one study is not patient ``A`` of another.
    """
    seen = {field: {str(v) for source in sources for v in _entries(source, field)} for field in FIELDS}
    known = [seen["studies"] == set() or s.study is None or s.study in seen["studies"] for s in slides]
    names = [s.name if same and s.name != UNNAMED else None for s, same in zip(slides, known, strict=True)]
    patients = [s.patient if same else None for s, same in zip(slides, known, strict=True)]
    found = tuple(name is not None and name in seen["slides"] for name in names)
    owners = tuple(patient is not None and patient in seen["patients"] for patient in patients)
    # of a slide that was itself seen, its patient goes without saying
    others = [p for p, own in zip(patients, found, strict=True) if not own]
    words = (_shared(seen["slides"], names, "slide"), _shared(seen["patients"], others, "patient"))
    return Exposure(tuple(s.name for s in slides), found, owners, tuple(w for w in words if w))


def _entries(source: Any, field: str) -> Sequence[Any]:
    """Return one list of what a model saw, as an attribute or as an entry."""
    if source is None:
        return ()
    found: Sequence[Any] = source.get(field, ()) if hasattr(source, "get") else getattr(source, field, ())
    return found


def _shared(train: set[str], test: Sequence[str | None], what: str) -> str:
    """Return the sentence that names what is on both sides, or nothing."""
    named = [name for name in test if name is not None]
    if not train or not named:
        return ""
    try:
        check_leakage(sorted(train), named, what=what)
    except InputError as error:
        said = str(error).partition(";")[0].replace("training and test", "the target and in what the model saw")
        return f"{said[0].upper()}{said[1:]}."
    return ""
