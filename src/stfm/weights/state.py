"""The tensors of a weights file, opened without running anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfm._errors import DataIntegrityError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

__all__ = ["read_state", "strip_prefix"]

_INSIDE = ("state_dict", "model", "teacher")
_PREFIXES = ("module.", "backbone.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file; nothing in it is run.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or a PyTorch file, which is opened with ``weights_only=True``.

    Returns
    -------
    Name -> tensor, without the prefixes of wrappers (``module.``, ``backbone.``).

    Raises
    ------
    MissingKeyError
        There is no such file.
    DataIntegrityError
        It is damaged, holds code, or holds something else than tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        msg = f"There is no weights file {path}."
        raise MissingKeyError(msg)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            msg = f"{path} is not a readable safetensors file ({error}); fetch it again."
            raise DataIntegrityError(msg) from error
    return strip_prefix(_tensors(path, _unpickled(path)), _PREFIXES)


def _unpickled(path: Path) -> Any:
    from pickle import UnpicklingError

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        msg = (
            f"{path} cannot be opened safely ({type(error).__name__}): it is damaged, or holds more than tensors, "
            "which stfm does not run. Convert it to safetensors where you trust it."
        )
        raise DataIntegrityError(msg) from error


def _tensors(path: Path, state: Any) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint."""
    import torch

    for key in _INSIDE:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        msg = f"{path} holds no state dict: names of tensors were expected, also under {', '.join(map(repr, _INSIDE))}."
        raise DataIntegrityError(msg)
    return state


def strip_prefix(state: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict without prefixes that every key carries."""
    out = dict(state)
    for prefix in prefixes:
        if out and all(key.startswith(prefix) for key in out):
            out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out
