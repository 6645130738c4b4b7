"""The table of platforms (``platforms.toml``) as frozen rows."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files

from stfm._registry import Registry

__all__ = ["PLATFORMS", "Platform", "get_platform"]


@dataclass(frozen=True)
class Platform:
    """Geometry and habits of one platform; lengths in µm."""

    name: str
    unit: str
    observation: str
    lattice: str
    diameter_um: float
    pitch_um: float
    neighbours: int
    spot_um: float
    niche_um: float
    min_counts: int
    normalisation: str
    reference: str


def _load() -> None:
    text = files("stfm.slide").joinpath("platforms.toml").read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        aliases = row.pop("aliases", ())
        keys = dict.fromkeys(_plain(k) for k in (name, *aliases))
        PLATFORMS.register(name, Platform(name=name, **row), aliases=[k for k in keys if k != name])


PLATFORMS: Registry[Platform] = Registry("platform", entry_points_group="stfm.platforms", loader=_load)


def _plain(name: str) -> str:
    """Return a name without case, blanks and marks."""
    return re.sub(r"[\s_\-]+", "", name).lower()


def get_platform(name: str | Platform) -> Platform:
    """Return the row of a platform; case, blanks, ``-`` and ``_`` in the name do not matter.

    Parameters
    ----------
    name
        Name or alias, or a row, which is returned as it is.

    Returns
    -------
    The row of the table.

    Raises
    ------
    MissingKeyError
        No platform has this name; the message holds the nearest ones.

    Examples
    --------
    >>> get_platform("visium").pitch_um
    100.0
    """
    if isinstance(name, Platform):
        return name
    return PLATFORMS.get(name if name in PLATFORMS else _plain(name))
