"""Errors and warnings that stfm raises: one line that says what is wrong, where, and what mends it."""

from stfm._errors import (
    DataIntegrityError,
    InputError,
    MissingDependencyError,
    MissingKeyError,
    StfmError,
    StfmWarning,
    WrongTypeError,
)

__all__ = [
    "DataIntegrityError",
    "InputError",
    "MissingDependencyError",
    "MissingKeyError",
    "StfmError",
    "StfmWarning",
    "WrongTypeError",
]
