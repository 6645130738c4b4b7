"""Files from the network: fetched by pooch, resumed where they were cut, and never used without their sha256."""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfm._errors import DataIntegrityError, InputError
from stfm._logging import get_logger
from stfm._progress import progress
from stfm._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import requests

logger = get_logger(__name__)

#: seconds to wait for a connection, and for the next bytes
TIMEOUT = (10.0, 60.0)
#: how often a transfer goes on by itself after it was cut, and seconds before the first time
RETRIES, PAUSE = 5, 0.5
_CHUNK = 2**18
_TRY_AGAIN = {429, 500, 502, 503, 504}
_REFUSED = {401, 403}
_NOTHING_LEFT = 416


def fetch_file(url: str, target: Path, sha256: str | None, *, page: str | None = None) -> Path:
    """Return a local copy of a file, fetched where it is missing or damaged.

    It is written beside the target and takes its name only when its hash is right: a file is whole or not there.
    What was received stays after a kill or a cut, and the next call goes on from there. Of several processes one
    fetches, and the others wait. A file that is there is returned from a folder that cannot be written, too.

    Parameters
    ----------
    url
        Where the file is.
    target
        Where it goes.
    sha256
        Of the file. None accepts what comes first, and later only the same.
    page
        Of a file behind terms: where they are accepted.

    Raises
    ------
    InputError
        The file is missing and the network is off limits, it cannot be fetched, or the folder cannot be written.
    DataIntegrityError
        What came (or, offline, what is there) is not the file that is meant.
    """
    expected = sha256 or _remembered(target)
    if is_whole(target, expected):
        return target
    if settings.offline:
        _refuse_offline(url, target, expected)
    with _lock(target):
        if target.is_file():  # another process may have fetched it meanwhile
            if _is_whole(target, expected):
                return target
            logger.warning("%s is damaged and fetched again", target)
        _fetch(url, target, expected, page)
        if sha256 is None:
            _memory(target).write_text(sha256_of(target), encoding="ascii")
    return target


def copy_file(source: Path, target: Path) -> Path:
    """Return a copy of a file, which takes its name when it is whole.

    Parameters
    ----------
    source
        What is copied.
    target
        Where it goes.

    Raises
    ------
    InputError
        The folder cannot be written.
    """
    with _lock(target):
        beside = target.with_name(f".{target.name}.copy")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, beside)
            beside.replace(target)
        except OSError as error:
            raise _unwritable(target, error) from error
    return target


def is_whole(path: Path, sha256: str | None) -> bool:
    """Return whether a file is there and is what is meant, or where no hash is known, what was accepted first.

    Parameters
    ----------
    path
        Of the file.
    sha256
        Of the file, where it is known.
    """
    return path.is_file() and _is_whole(path, sha256 or _remembered(path))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file; it is read again only when it has changed."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=1024)
def _sha256(path: str, *_state: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path, expected: str | None) -> bool:
    return expected is None or sha256_of(path) == expected


def _memory(target: Path) -> Path:
    """Return the file that keeps the hash of what was first accepted without one."""
    return target.with_name(f".{target.name}.sha256")


def _remembered(target: Path) -> str | None:
    memory = _memory(target)
    return memory.read_text(encoding="ascii").strip() if target.is_file() and memory.is_file() else None


def _refuse_offline(url: str, target: Path, expected: str | None) -> None:
    if not target.is_file():
        raise InputError(
            f"{target} is not in the cache and STFM_OFFLINE is set; unset it, or put the file there from {url}"
        )
    found, wanted = sha256_of(target)[:12], (expected or "")[:12]
    raise DataIntegrityError(
        f"{target} is damaged (sha256 {found}…, expected {wanted}…); delete it and fetch it again "
        f"without STFM_OFFLINE, or copy it from {url}"
    )


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Let one process at a time fetch a file. The system releases the lock of a process that dies."""
    from filelock import FileLock, Timeout

    folder = settings.cache_dir / ".locks"
    name = hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process fetches %s; waiting for it", target.name)
            lock.acquire()
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(
        f"{target} is missing or damaged, and the cache cannot be written ({error.strerror or error}); set STFM_CACHE "
        "to a folder that can be, or name the folder that has the weights with STFM_WEIGHTS"
    )


def _fetch(url: str, target: Path, expected: str | None, page: str | None) -> None:
    import pooch
    import requests

    logger.info("fetching %s", url)
    pooch.get_logger().setLevel("WARNING")
    work = target.with_name(f".{target.name}.fetch")  # what was received so far, and what pooch writes
    known = None if expected is None else f"sha256:{expected}"
    resume = ResumingDownloader(work, certain=expected is not None)
    try:
        work.mkdir(parents=True, exist_ok=True)
        try:
            pooch.retrieve(url, known_hash=known, fname="whole", path=work, downloader=resume)
        except ValueError as error:  # pooch's word for a wrong hash: perhaps the file changed between two parts of it
            if isinstance(error, requests.RequestException) or not resume.resumed:
                raise
            pooch.retrieve(url, known_hash=known, fname="whole", path=work, downloader=resume)
        (work / "whole").replace(target)
    except requests.RequestException as error:  # before ValueError: a malformed address is both
        if not resume.part.exists():
            shutil.rmtree(work)
        raise _explain(url, target, page, error) from error
    except ValueError as error:
        shutil.rmtree(work)
        raise DataIntegrityError(
            f"what {url} gave is not the file that is meant (expected sha256 {(expected or '')[:12]}…); try again, or "
            "check STFM_MIRROR"
        ) from error
    except OSError as error:
        raise _unwritable(target, error) from error
    shutil.rmtree(work)


def _explain(url: str, target: Path, page: str | None, error: requests.RequestException) -> InputError:
    status = None if error.response is None else error.response.status_code
    if status in _REFUSED and page is not None:
        return InputError(
            f"{url} is behind terms that are to be accepted first ({status}): accept them at {page}, and put the file "
            f"at {target}, or name its folder with STFM_WEIGHTS"
        )
    return InputError(
        f"could not fetch {url} ({type(error).__name__}: {error}); check the network, set STFM_MIRROR, or put the file "
        f"at {target}"
    )


class ResumingDownloader:
    """Downloader for pooch that keeps what it received and asks for the rest only.

    Parameters
    ----------
    work
        Folder of the part that was received.
    certain
        Whether a hash will tell that the parts belong together; else only a server that confirms it is resumed.
    """

    def __init__(self, work: Path, *, certain: bool) -> None:
        self.part = work / "part"
        self.tag = work / "tag"
        self.certain = certain
        self.resumed = False

    def __call__(self, url: str, output_file: Any, pooch: Any, check_only: bool = False) -> None:  # noqa: FBT001, FBT002
        """Fetch ``url`` into ``output_file``, as pooch asks."""
        import requests

        self.resumed = False
        left = RETRIES
        while True:
            before = self._have()
            try:
                self._receive(url)
                break
            except requests.RequestException as error:
                status = None if error.response is None else error.response.status_code
                # go on where bytes came, or where the server asks to; a dead port or a 404 is told at once
                if left == 0 or not (status in _TRY_AGAIN or (status is None and self._have() > before)):
                    raise
                logger.info("%s was cut at %d bytes (%s); going on", url, self._have(), type(error).__name__)
                time.sleep(PAUSE * 2 ** (RETRIES - left))
                left -= 1
        self.part.replace(output_file)
        self.tag.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _receive(self, url: str) -> None:
        """Ask once, for what is missing where that is safe, and keep what comes."""
        import requests

        have = self._have()
        tag = self.tag.read_text(encoding="utf-8") if self.tag.is_file() else ""
        if not (tag or self.certain):
            have = 0
        headers = {"Accept-Encoding": "identity"}  # bytes on disk are then bytes of the file
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            told = response.headers.get("Content-Range", "")
            if have and response.status_code == _NOTHING_LEFT and told.endswith(f"*/{have}"):
                self.resumed = True
                return
            partial = response.status_code == requests.codes.partial_content
            if have and (response.status_code == _NOTHING_LEFT or (partial and not told.startswith(f"bytes {have}-"))):
                self.part.unlink()  # the server has another file, or another idea of ranges
                return self._receive(url)
            response.raise_for_status()
            self.resumed = self.resumed or partial
            self._write(response, have if partial else 0)

    def _write(self, response: requests.Response, have: int) -> None:
        etag = response.headers.get("ETag", "")
        tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        if tag:
            self.tag.write_text(tag, encoding="utf-8")
        else:
            self.tag.unlink(missing_ok=True)
        size = response.headers.get("Content-Length")
        total = have + int(size) if size else None
        name = self.part.parent.name.removeprefix(".").removesuffix(".fetch")
        with self.part.open("ab" if have else "wb") as file, progress(name, total, unit="bytes") as advance:
            advance(have)
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                advance(len(chunk))
