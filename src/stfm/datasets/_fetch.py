"""Files of public data sets: looked for in the cache, fetched through pooch, and never used without their sha256."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from stfm._errors import DataIntegrityError, InputError
from stfm._logging import get_logger
from stfm._settings import settings

logger = get_logger(__name__)


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
    expected = source.files[path]
    target = settings.cache_dir / source.name / path
    base = f"{settings.mirror.rstrip('/')}/{source.name}" if settings.mirror else source.url
    url = f"{base}/{path}"
    if target.is_file():
        found = _sha256(target)
        if found == expected:
            return target
        if settings.offline:
            raise DataIntegrityError(
                f"{target} is damaged (sha256 {found[:12]}…, expected {expected[:12]}…); delete it and fetch it again "
                f"without STFM_OFFLINE, or copy it from {url}"
            )
        logger.warning("%s is damaged and fetched again", target)
        _remove(target)
    elif settings.offline:
        raise InputError(
            f"{target} is not in the cache and STFM_OFFLINE is set; unset it, or put the file there from {url}"
        )
    _download(url, expected, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise DataIntegrityError(
            f"{path} is damaged and cannot be removed ({error.strerror}); delete it, or choose another STFM_CACHE"
        ) from error


def _download(url: str, expected: str, target: Path) -> None:
    """Fetch into a temporary file beside the target; it takes its name only when its hash is right."""
    import pooch

    logger.info("fetching %s", url)
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(url, known_hash=f"sha256:{expected}", fname=target.name, path=target.parent)
    except ValueError as error:  # pooch's word for a wrong hash; it has removed the file
        raise DataIntegrityError(
            f"what {url} gave is not the file that is meant (expected sha256 {expected[:12]}…); try again, or check "
            "STFM_MIRROR"
        ) from error
    except OSError as error:  # the errors of requests are OSErrors too
        raise InputError(
            f"could not fetch {url} ({type(error).__name__}: {error}); check the network, set STFM_MIRROR, or put the "
            f"file at {target}"
        ) from error
