"""Weights on the Hugging Face hub, through ``huggingface_hub``: its cache, its token, its ways to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stfm._download import copy_file, sha256_of
from stfm._errors import DataIntegrityError, InputError, MissingKeyError
from stfm._optional import require
from stfm._settings import settings

__all__ = ["HUB", "fetch_from_hub", "push_folder"]

HUB = "hub:"
_HOME = "https://huggingface.co"
_TOKEN = "HF_TOKEN is set, or `hf auth login` was run, with a token that may read"


def parse(source: str) -> tuple[str, str, str | None]:
    """Return repository, file and revision of ``hub:<owner>/<repo>[@<revision>]/<file>``."""
    owner, _, rest = source.removeprefix(HUB).partition("/")
    repo, _, file = rest.partition("/")
    repo, _, revision = repo.partition("@")
    if {"", ".", ".."} & {owner, repo, *file.split("/")} or revision in {".", ".."}:
        msg = f"{source!r} names no file on the hub; it is written {HUB}<owner>/<repo>/<file>."
        raise InputError(msg)
    return f"{owner}/{repo}", file, revision or None


def fetch_from_hub(source: str, *, gated: bool = False, sha256: str | None = None, target: Path | None = None) -> Path:
    """Return a file of the hub, from the hub's own cache where it is there.

    Parameters
    ----------
    source
        ``hub:<owner>/<repo>/<file>``, with ``@<revision>`` behind the repo if not the newest is meant.
    gated
        Whether terms are known to stand before it.
    sha256
        Of the file, where known.
    target
        Where a copy goes; None returns the file in the hub's cache (``HF_HOME``).

    Raises
    ------
    MissingDependencyError
        huggingface_hub is not installed.
    MissingKeyError
        There is no such file.
    InputError
        Terms are to be accepted first, or the hub cannot be reached.
    DataIntegrityError
        It is not the file that is meant.
    """
    repo, file, revision = parse(source)
    hub = require("huggingface_hub", extra="hub")
    try:
        found = Path(hub.hf_hub_download(repo, file, revision=revision, local_files_only=settings.offline))
    except (*_errors(hub), hub.errors.EntryNotFoundError) as error:
        raise _explain(hub.errors, error, repo, file, gated=gated) from error
    if sha256 is not None and sha256_of(found) != sha256:
        msg = (
            f"{source} is not the file that is meant (sha256 {sha256_of(found)[:12]}…, expected {sha256[:12]}…); "
            f"delete {found} and fetch it again."
        )
        raise DataIntegrityError(msg)
    return found if target is None else copy_file(found, target)


def _errors(hub: Any) -> tuple[type[Exception], ...]:
    """Return what the client raises: its own errors, and through their bases those of its HTTP library."""
    return (OSError, ValueError, *hub.errors.HfHubHTTPError.__bases__)


def _explain(errors: object, error: Exception, repo: str, file: str, *, gated: bool) -> InputError | MissingKeyError:
    """Say what stands between the user and a file, the narrow reasons first."""

    def of(*names: str) -> bool:
        return isinstance(error, tuple(found for name in names if (found := getattr(errors, name, None)) is not None))

    page = f"{_HOME}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if of("GatedRepoError") or (gated and status in {401, 403, 404}):
        return InputError(
            f"{repo} is behind terms that are to be accepted first: accept them at {page}, and see that {_TOKEN}."
        )
    if of("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        reason = "STFM_OFFLINE is set" if settings.offline else "the hub cannot be reached"
        return InputError(
            f"{file} of {repo} is not in the cache of the hub, and {reason}; fetch it where there is a network, or put "
            f"it into the folder STFM_WEIGHTS (from {page})."
        )
    if of("EntryNotFoundError", "RevisionNotFoundError"):
        return MissingKeyError(f"{repo} has no file {file!r} (or not in that revision); see {page}/tree/main.")
    if of("RepositoryNotFoundError"):
        return MissingKeyError(f"There is no {repo!r} on the hub, or it is not public; then see that {_TOKEN}.")
    return InputError(f"could not fetch {file} of {repo} from the hub ({type(error).__name__}: {error}).")


def push_folder(
    folder: Path, repo_id: str, *, token: str | None, private: bool, message: str, revision: str | None
) -> str:
    """Upload a folder to a repository of the hub, made where it is not there; returns its address.

    Parameters
    ----------
    folder
        What is uploaded, whole.
    repo_id
        ``"<owner>/<repo>"``.
    token
        None takes the one of ``HF_TOKEN`` or ``hf auth login``.
    private
        Whether a repository that is made is private.
    message
        Of the commit.
    revision
        Branch to upload to; None is the main one.
    """
    hub = require("huggingface_hub", extra="hub")
    if settings.offline:
        msg = f"STFM_OFFLINE is set; unset it to push to {_HOME}/{repo_id}."
        raise InputError(msg)
    api = hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message, revision=revision)
    except _errors(hub) as error:
        msg = f"could not push to {_HOME}/{repo_id} ({type(error).__name__}: {error}); see that {_TOKEN}, and write."
        raise InputError(msg) from error
    return f"{_HOME}/{repo_id}"
