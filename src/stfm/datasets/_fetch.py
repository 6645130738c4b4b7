"""Files of public data sets: looked for in the cache, fetched through pooch, and never used without their sha256."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from stfm._download import fetch_file
from stfm._settings import settings


@dataclass(frozen=True)
class Source:
    """One public data set: where it lives, and the sha256 of every file."""

    name: str
    title: str
    url: str
    repository: str
    commit: str
    species: str
    platform: str
    licence: str
    reference: str
    files: dict[str, str]

    def under(self, prefix: str) -> str | None:
        """Return the only file below a folder, or None."""
        found = [path for path in self.files if path.startswith(prefix)]
        return found[0] if found else None


@cache
def sources() -> dict[str, Source]:
    """Return the public data sets of ``remote.toml`` by name."""
    table = tomllib.loads(files("stfm.datasets").joinpath("remote.toml").read_text(encoding="utf-8"))
    return {name: Source(name=name, **row) for name, row in table.items()}


def fetch(source: Source, paths: Iterable[str]) -> list[Path]:
    """Return local copies of some files of a data set, fetched where they are missing or damaged.

    A file is kept at ``settings.cache_dir / <data set> / <path>``; a cache that holds it may be read-only.

    Raises
    ------
    InputError
        A file is missing and the network is off limits, or the fetch failed.
    DataIntegrityError
        What was fetched (or, offline, what lies in the cache) is not the file that is meant.
    """
    return [_fetch_one(source, path) for path in paths]


def _fetch_one(source: Source, path: str) -> Path:
    base = f"{settings.mirror.rstrip('/')}/{source.name}" if settings.mirror else source.url
    return fetch_file(f"{base}/{path}", settings.cache_dir / source.name / path, source.files[path])
