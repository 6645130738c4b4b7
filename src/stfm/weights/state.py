"""The tensors of a weights file, opened without running anything in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from stfm._errors import DataIntegrityError, InputError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["check_finite", "read_state", "strip_prefix", "unwrap"]

#: keys under which training code wraps the weights
_WRAPPERS = ("state_dict", "model", "teacher")
_PREFIXES = ("module.", "backbone.")
#: what torch raises where a file is damaged, by the place of the damage
_UNREADABLE = (
    UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError,
    OverflowError, AssertionError,
)  # fmt: skip


def read_state(path: str | Path, *, nested: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a weights file; nothing in it is run.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or a PyTorch file, which is opened with ``weights_only=True``.
    nested
        Whether entries that are no tensors may stay, for a caller who knows what lies in them.

    Returns
    -------
    Name -> tensor, without what training code wraps around them.

    Raises
    ------
    MissingKeyError
        There is no such file.
    InputError
        It is a folder.
    DataIntegrityError
        It is damaged, holds code, or holds something else than tensors.
    """
    path = Path(path).expanduser()
    check_there(path)
    if path.is_dir():
        msg = f"{path} is a folder; give the file of weights in it."
        raise InputError(msg)
    return unwrap(_opened(path), str(path), nested=nested)


def check_there(path: Path) -> None:
    """Refuse a file, or the folder of a saved model, that is not there."""
    if not path.exists():
        msg = f"There is no weights file {path}."
        raise MissingKeyError(msg)


def _opened(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            msg = f"{path} is not a readable safetensors file ({error}); fetch it again."
            raise DataIntegrityError(msg) from error
    import warnings

    import torch

    try:
        with warnings.catch_warnings():  # of the pickle's protocol: what cannot be read is told below
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _UNREADABLE as error:
        msg = (
            f"{path} cannot be opened safely ({type(error).__name__}): it is damaged, or holds more than tensors, "
            "which stfm does not run. Fetch it again, or convert it to safetensors where you trust it."
        )
        raise DataIntegrityError(msg) from error


def unwrap(state: Any, where: str, *, nested: bool = False) -> dict[str, Tensor]:
    """Return the named tensors inside what training code saved: a wrapper's entry, a wrapper's prefix.

    Parameters
    ----------
    state
        What a file held: tensors by name, perhaps under ``"model"`` beside an optimiser's state (ST-Net), or under
        ``"teacher"`` beside a student (iBOT).
    where
        What the messages call it.
    nested
        Whether entries that are no tensors may stay.

    Returns
    -------
    Name -> tensor.

    Raises
    ------
    DataIntegrityError
        There are no named tensors, or other things among them.
    """
    from torch import Tensor

    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        msg = f"{where} holds no named tensors ({type(state).__name__}); a state dict was expected."
        raise DataIntegrityError(msg)
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others and not nested:
        msg = f"{where} holds what is no tensor ({', '.join(others[:3])}); a state dict of weights was expected."
        raise DataIntegrityError(msg)
    return strip_prefix({str(key): value for key, value in state.items()}, _PREFIXES)


def strip_prefix(state: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict without prefixes that every key carries.

    Parameters
    ----------
    state
        Name -> tensor.
    prefixes
        Tried in turn.
    """
    out = dict(state)
    for prefix in prefixes:
        if out and all(key.startswith(prefix) for key in out):
            out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite.

    Parameters
    ----------
    state
        Name -> tensor; whole numbers, and tensors that hold nothing (on the meta device), are passed over.
    where
        What the message calls it.

    Raises
    ------
    DataIntegrityError
        One of them is not finite; the message names the first.
    """
    import torch

    for name, tensor in state.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        # A sum is finite only over what is finite, and many times as fast as a look at each value; the look tells
        # those whose sum alone is too large.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.double().isfinite().all():
            msg = (
                f"{where} holds weights that are NaN or infinite, {name!r} first; "
                "it is damaged, or its training diverged: give another one."
            )
            raise DataIntegrityError(msg)
