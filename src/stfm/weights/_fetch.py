"""Weights by name, file, address or hub: where they are, fetched where they are not, and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from stfm._download import fetch_file, is_whole, sha256_of
from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmError
from stfm._logging import get_logger
from stfm._settings import settings
from stfm._validate import did_you_mean
from stfm.weights.hub import HUB, fetch_from_hub, parse
from stfm.weights.registry import WEIGHTS, WeightsSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

__all__ = ["fetch", "list_weights", "locate", "path", "verify"]

logger = get_logger(__name__)

_ROOM = "weights"
_SCHEMES = ("http://", "https://")
#: how what lies elsewhere begins
REMOTE = (*_SCHEMES, HUB)
_MIB = 2**20


def list_weights() -> pd.DataFrame:
    """List the weights that have a name.

    Returns
    -------
    DataFrame with a row a name: summary, kind, version, files, size (MiB; nan where not known), licence, gated, source
    (``"packaged"`` or an address), card, and whether they are there.

    Examples
    --------
    >>> import stfm as sf
    >>> sf.weights.list_weights().loc["default", "source"]
    'packaged'
    """
    import pandas as pd

    rows = {
        spec.name: {
            "summary": spec.summary,
            "kind": spec.kind,
            "version": spec.version,
            "files": len(spec.files),
            "size": spec.size / _MIB if spec.size else float("nan"),
            "licence": spec.licence,
            "gated": spec.gated,
            "source": "packaged" if spec.packaged else (spec.urls or ("",))[0],
            "card": spec.card,
            "there": _folder(spec) is not None,
        }
        for spec in WEIGHTS
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = _ROOM
    return table


def path(name: str) -> Path:
    """Return where weights are on this machine; nothing is fetched or checked.

    Parameters
    ----------
    name
        Row of :func:`list_weights`.

    Returns
    -------
    The file, or the folder of weights that are several files.

    Raises
    ------
    MissingKeyError
        There is no such row.
    InputError
        The weights are not there.
    """
    spec = WEIGHTS.get(name)
    folder = _folder(spec)
    if folder is None:
        raise InputError(_absent(spec))
    return _result(spec, folder)


def fetch(name: str) -> Path:
    """Return weights by their name, fetched into the cache where they are not there, and checked by sha256.

    They are looked for in the wheel, in the folder ``STFM_WEIGHTS``, in the cache, under ``STFM_MIRROR``, and at last
    where their publisher keeps them. A fetch that was cut goes on where it stopped; of two processes one fetches.

    Parameters
    ----------
    name
        Row of :func:`list_weights`.

    Returns
    -------
    The file, or the folder of weights that are several files.

    Raises
    ------
    MissingKeyError
        There is no such row.
    InputError
        They are not there and cannot be fetched: no network, ``STFM_OFFLINE``, terms that were not accepted.
    DataIntegrityError
        What is there, or came, is not the file that is meant.

    Examples
    --------
    >>> import stfm as sf
    >>> sf.weights.fetch("deflaut")
    Traceback (most recent call last):
    ...
    stfm._errors.MissingKeyError: There is no set of weights 'deflaut'. Did you mean 'default'?
    """
    spec = WEIGHTS.get(name)
    if spec.packaged and _folder(spec) is None:
        raise InputError(_absent(spec))
    folder = _folder(spec) if spec.packaged else next((f for f in _own_folders(spec) if _holds(spec, f)), None)
    if folder is not None:
        for file, sha256 in spec.files.items():
            _check(folder / file, sha256)
        return _result(spec, folder)
    folder = settings.cache_dir / _ROOM / spec.name
    for file, sha256 in spec.files.items():
        _fetch_one(spec, file, sha256, folder / file)
    return _result(spec, folder)


def verify(name: str | None = None) -> pd.DataFrame:
    """Compare the weights on this machine with their sha256; nothing is fetched.

    Parameters
    ----------
    name
        Row of :func:`list_weights`; None checks all.

    Returns
    -------
    DataFrame with a row a file: weights, file, state (``"ok"``, ``"damaged"``, ``"absent"``, or ``"unlisted"`` for
    packaged files whose sha256 is not in the table), path.

    Raises
    ------
    MissingKeyError
        There is no such row.
    """
    import pandas as pd

    rows = [row for spec in ([WEIGHTS.get(name)] if name is not None else WEIGHTS) for row in _states(spec)]
    return pd.DataFrame(rows, columns=[_ROOM, "file", "state", "path"])


def locate(source: str | Path, *, sha256: str | None = None, gated: bool = False) -> Path:
    """Return weights that are named in any way, fetched where they are not there.

    Parameters
    ----------
    source
        A path, a row of :func:`list_weights`, an address (``https://...``), or ``"hub:<owner>/<repo>/<file>"``, with
        ``@<revision>`` behind the repo if not the newest is meant.
    sha256
        Of the file, where it is known. Of a file from an address without one, the first fetch sets what is accepted
        later.
    gated
        Whether the publisher wants terms to be accepted first; a refusal then says where.

    Returns
    -------
    The file or folder.

    Raises
    ------
    MissingKeyError
        There is no such file, and no such row.
    InputError
        It cannot be fetched.
    DataIntegrityError
        It is not the file that is meant.
    MissingDependencyError
        ``hub:`` without the package ``huggingface_hub``.

    Examples
    --------
    >>> import stfm as sf
    >>> sf.weights.locate("no/such/file.safetensors")
    Traceback (most recent call last):
    ...
    stfm._errors.MissingKeyError: There is no file no/such/file.safetensors, ...
    """
    text = str(source)
    if text.startswith(HUB):
        return _from_hub(text, sha256, gated=gated)
    if text.startswith(_SCHEMES):
        return _from_address(text, _key(text), sha256, gated=gated)
    if isinstance(source, str) and source in WEIGHTS:
        return fetch(source)
    local = Path(source).expanduser()
    if not local.exists():
        msg = (
            f"There is no file {text}, and no weights of that name. {did_you_mean(text, WEIGHTS.names())} "
            f"Weights are a path, a name, https://..., or {HUB}<owner>/<repo>/<file>."
        )
        raise MissingKeyError(msg)
    if sha256 is not None:
        _check(local, sha256)
    return local


def _own_folders(spec: WeightsSpec) -> Iterator[Path]:
    """Return the folders that the user names: one a row; or all in one, where a hash tells whose a file is."""
    if settings.weights_dir is not None:
        yield settings.weights_dir / spec.name
        if len(spec.files) == 1 and _is_it(settings.weights_dir / next(iter(spec.files)), *spec.files.values()):
            yield settings.weights_dir


def _folder(spec: WeightsSpec) -> Path | None:
    """Return the folder that holds all of it."""
    if spec.packaged_folder is not None:
        return spec.packaged_folder if _holds(spec, spec.packaged_folder) else None
    places = [*_own_folders(spec), settings.cache_dir / _ROOM / spec.name]
    return next((place for place in places if _holds(spec, place)), None)


def _holds(spec: WeightsSpec, folder: Path) -> bool:
    return folder.is_dir() and all((folder / file).is_file() for file in spec.files)


def _result(spec: WeightsSpec, folder: Path) -> Path:
    return folder / next(iter(spec.files)) if len(spec.files) == 1 else folder


def _absent(spec: WeightsSpec) -> str:
    if spec.packaged:
        return f"The weights {spec.name!r} do not come with this version ({spec.packaged_folder} is not whole)."
    return (
        f"The weights {spec.name!r} are not on this machine; sf.weights.fetch({spec.name!r}) or "
        f"`stfm weights fetch {spec.name}` fetches them."
    )


def _is_it(file: Path, sha256: str | None) -> bool:
    return sha256 is not None and file.is_file() and sha256_of(file) == sha256


def _check(file: Path, sha256: str) -> None:
    found = sha256_of(file)
    if found != sha256:
        msg = f"{file} is not the file that is meant (sha256 {found[:12]}…, expected {sha256[:12]}…); replace it."
        raise DataIntegrityError(msg)


def _fetch_one(spec: WeightsSpec, file: str, sha256: str, target: Path) -> None:
    """Try the addresses in turn; the error of the last one is told."""
    if _is_it(target, sha256):
        return
    bases = (f"{settings.mirror.rstrip('/')}/{_ROOM}/{spec.name}",) if settings.mirror else spec.urls
    for number, base in enumerate(bases):
        address = f"{base.rstrip('/')}/{file}"
        try:
            if base.startswith(HUB):
                fetch_from_hub(address, gated=spec.gated, sha256=sha256, target=target)
            else:
                fetch_file(address, target, sha256, page=spec.card if spec.gated else None)
        except StfmError as error:
            if number == len(bases) - 1:
                raise
            logger.warning("%s; trying the next address", error)
        else:
            return


def _from_hub(source: str, sha256: str | None, *, gated: bool) -> Path:
    parse(source)
    key = Path("hub", *source.removeprefix(HUB).split("/"))
    if settings.mirror:
        return _from_address(source, key, sha256, gated=gated)
    kept = settings.cache_dir / _ROOM / key  # what once came through a mirror
    own = _own_file(key, sha256) or (kept if is_whole(kept, sha256) else None)
    if own is not None:
        return own
    return fetch_from_hub(source, gated=gated, sha256=sha256)


def _from_address(address: str, key: Path, sha256: str | None, *, gated: bool) -> Path:
    own = _own_file(key, sha256)
    if own is not None:
        return own
    url = f"{settings.mirror.rstrip('/')}/{_ROOM}/{key.as_posix()}" if settings.mirror else address
    return fetch_file(url, settings.cache_dir / _ROOM / key, sha256, page=address if gated else None)


def _key(address: str) -> Path:
    """Return where the file of an address lies below the cache, one place an address."""
    parts = urlsplit(address)
    place = [part for part in parts.path.split("/") if part not in {"", ".", ".."}] or ["file"]
    if parts.query:
        place[-1] = f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{place[-1]}"
    return Path("url", parts.netloc.replace(":", "_"), *place)


def _own_file(key: Path, sha256: str | None) -> Path | None:
    """Return the file in the user's own folder: by its whole key, or by its name where a hash tells that it is it."""
    if settings.weights_dir is None:
        return None
    file, bare = settings.weights_dir / key, settings.weights_dir / key.name
    if not file.is_file():
        return bare if _is_it(bare, sha256) else None
    if sha256 is not None:
        _check(file, sha256)
    return file


def _states(spec: WeightsSpec) -> list[tuple[str, str, str, str]]:
    folder = _folder(spec)
    if folder is None:
        places = [*_own_folders(spec), spec.packaged_folder or settings.cache_dir / _ROOM / spec.name]
        folder = next((p for p in places if any((p / f).is_file() for f in spec.files)), places[-1])
    listed = dict(spec.files)
    if spec.packaged and folder.is_dir():
        listed |= {file.name: "" for file in sorted(folder.iterdir()) if file.is_file() and file.name not in listed}
    rows = []
    for file, sha256 in listed.items():
        at = folder / file
        state = "absent" if not at.is_file() else "unlisted" if not sha256 else ""
        rows.append((spec.name, file, state or ("ok" if sha256_of(at) == sha256 else "damaged"), str(at)))
    return rows or [(spec.name, "", "absent", str(folder))]
