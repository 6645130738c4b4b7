"""Registry of weights, filled from ``registry.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from stfm._errors import InputError
from stfm._registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["WEIGHTS", "WeightsSpec"]

_KINDS = ("model", "encoder", "table")


@dataclass(frozen=True)
class WeightsSpec:
    """A row of the table of weights.

    Attributes
    ----------
    name
        Name under which they are found.
    summary
        What they are, in a line.
    kind
        ``"model"``: a folder that :func:`stfm.models.load` reads; ``"encoder"``, ``"table"``: files.
    version
        Version of these weights; a name keeps its meaning, its numbers may improve.
    licence
        SPDX name of the licence, or what the publisher says.
    gated
        Whether the publisher wants terms to be accepted first.
    card
        Page, or file among them, that says what they saw.
    size
        Bytes of all files; 0 where it is not known.
    packaged
        Folder that ships in the wheel: below ``stfm/weights/packaged``, or the whole path (of another package).
    urls
        Bases below which the files lie: ``https://...`` or ``hub:<owner>/<repo>``, tried in turn.
    files
        File -> sha256.
    """

    name: str
    summary: str
    kind: str = "model"
    version: str = "1"
    licence: str = "not stated"
    gated: bool = False
    card: str = ""
    size: int = 0
    packaged: str | Path = ""
    urls: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            msg = f"weights {self.name!r}: kind={self.kind!r} is none of {', '.join(_KINDS)}."
            raise InputError(msg)
        for file, sha256 in self.files.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                msg = f"weights {self.name!r}: {file!r} leaves the folder that is theirs."
                raise InputError(msg)
            if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
                msg = f"weights {self.name!r}: {sha256!r} is no sha256 of {file!r} (64 digits 0-9, a-f)."
                raise InputError(msg)

    @property
    def packaged_folder(self) -> Path | None:
        """Folder in the wheel, or None for weights that are fetched."""
        return PACKAGED / self.packaged if self.packaged else None

    @property
    def label(self) -> str:
        """Name and version, as results record them."""
        return f"{self.name}@{self.version}"


#: folder of what ships in the wheel
PACKAGED = Path(str(files("stfm.weights"))) / "packaged"


def _load() -> None:
    text = files("stfm.weights").joinpath("registry.toml").read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        row["urls"] = tuple(row.get("urls", ()))
        WEIGHTS.register(name, WeightsSpec(name=name, **row))


WEIGHTS: Registry[WeightsSpec] = Registry("set of weights", entry_points_group="stfm.weights", loader=_load)
