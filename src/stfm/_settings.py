"""Settings that hold for the whole process, from the environment and by assignment."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfm import _logging
from stfm._errors import InputError
from stfm._validate import check_choice, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRUE = {"1", "true", "yes", "on"}
_DEVICES = ("auto", "cpu", "cuda", "mps")
_NAMES = ("cache_dir", "offline", "mirror", "weights_dir", "device", "verbosity")


class Settings:
    """Settings of stfm.

    Attributes
    ----------
    cache_dir
        Folder of fetched and derived files (``STFM_CACHE``; else the user's cache folder).
    offline
        Never touch the network (``STFM_OFFLINE=1``).
    mirror
        Base URL that stands in for the public homes of data and weights (``STFM_MIRROR``).
    weights_dir
        Folder of weights that is looked in first, for machines without a network (``STFM_WEIGHTS``); only read.
    device
        ``"auto"`` (CUDA, then MPS, then CPU), ``"cpu"``, ``"cuda"`` or ``"mps"``.
    verbosity
        0 errors only (and no progress bars), 1 warnings, 2 information, 3 everything.
    """

    def __init__(self) -> None:
        self._cache_dir: Path | None = None
        self._offline: bool | None = None
        self._mirror: str | None = None
        self._weights_dir: Path | None = None
        self._device = "auto"
        self._verbosity = 1

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a name that is no setting, which would be taken and never read."""
        if name.removeprefix("_") not in _NAMES:
            msg = f"There is no setting {name!r}. {did_you_mean(name, _NAMES)}"
            raise InputError(msg)
        super().__setattr__(name, value)

    @property
    def cache_dir(self) -> Path:
        """Folder of fetched and derived files."""
        if self._cache_dir is not None:
            return self._cache_dir
        if value := os.environ.get("STFM_CACHE"):
            return Path(value).expanduser()
        import pooch

        return Path(pooch.os_cache("stfm"))

    @cache_dir.setter
    def cache_dir(self, value: str | Path | None) -> None:
        self._cache_dir = None if value is None else Path(value).expanduser()

    @property
    def offline(self) -> bool:
        """Whether the network is off limits."""
        if self._offline is not None:
            return self._offline
        return os.environ.get("STFM_OFFLINE", "").lower() in _TRUE

    @offline.setter
    def offline(self, value: bool | None) -> None:
        self._offline = value

    @property
    def mirror(self) -> str | None:
        """Base URL that replaces the public homes, or None."""
        return self._mirror or os.environ.get("STFM_MIRROR") or None

    @mirror.setter
    def mirror(self, value: str | None) -> None:
        self._mirror = value

    @property
    def weights_dir(self) -> Path | None:
        """Folder of weights that is looked in first, or None."""
        if self._weights_dir is not None:
            return self._weights_dir
        value = os.environ.get("STFM_WEIGHTS")
        return Path(value).expanduser() if value else None

    @weights_dir.setter
    def weights_dir(self, value: str | Path | None) -> None:
        self._weights_dir = None if value is None else Path(value).expanduser()

    @property
    def device(self) -> str:
        """Device on which models run."""
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        self._device = check_choice("device", value, _DEVICES)

    @property
    def verbosity(self) -> int:
        """How much stfm says."""
        return self._verbosity

    @verbosity.setter
    def verbosity(self, value: int) -> None:
        if value not in _logging.LEVELS:
            msg = f"verbosity must be 0, 1, 2 or 3, got {value!r}."
            raise InputError(msg)
        self._verbosity = value
        _logging.show(value)

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change settings inside a ``with`` block, and put the old ones back after it."""
        if unknown := sorted(set(values) - set(_NAMES)):
            msg = f"There is no setting {unknown[0]!r}. {did_you_mean(unknown[0], _NAMES)}"
            raise InputError(msg)
        before = {name: getattr(self, f"_{name}") for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, f"_{name}", value)

    def __repr__(self) -> str:
        return "\n".join(f"{name} = {getattr(self, name)!r}" for name in _NAMES)


settings = Settings()
