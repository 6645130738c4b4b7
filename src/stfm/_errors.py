"""Every error and warning that stfm raises on purpose."""

from __future__ import annotations

__all__ = [
    "DataIntegrityError",
    "InputError",
    "MissingDependencyError",
    "MissingKeyError",
    "StfmError",
    "StfmWarning",
    "WrongTypeError",
]


class StfmError(Exception):
    """Base of all errors of stfm: one line that says what is wrong, where, and what mends it."""


class InputError(StfmError, ValueError):
    """A value that cannot be used: wrong range, wrong scale, wrong shape, not a number."""


class WrongTypeError(StfmError, TypeError):
    """An object of a kind that the function does not read."""


class MissingKeyError(StfmError, KeyError):
    """A slot, column or name that does not exist; the message lists what does."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote and escape the advice.
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(StfmError, ImportError):
    """An optional package is not installed; the message holds the line that installs it."""


class DataIntegrityError(StfmError, ValueError):
    """A file is not what it should be: wrong hash, cut short, of another format."""


class StfmWarning(UserWarning):
    """Something was decided or found that the user should know about."""
