"""Where a model runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from stfm._errors import InputError
from stfm._settings import settings
from stfm._validate import check_choice

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["autocast", "evaluating", "resolve_device"]


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device of a name; ``"auto"`` takes the one of the settings, else CUDA, then MPS, then the CPU.

    Parameters
    ----------
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or a device.

    Returns
    -------
    The device.

    Raises
    ------
    InputError
        The device is not there; the message says which are.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = str(device)
    if name == "auto":
        name = settings.device
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, number = name.partition(":")
    check_choice("device", kind, there)
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there[kind] or (number and not (number.isdigit() and int(number) < count)):
        have = ", ".join(k for k, on in there.items() if on)
        msg = f"device={name!r} is not there; this machine has: {have}. device='auto' takes the best of them."
        raise InputError(msg)
    return torch.device(name)


@contextmanager
def evaluating(module: torch.nn.Module, device: torch.device, *, gradients: bool = False) -> Iterator[torch.nn.Module]:
    """Put a module on a device in evaluation mode, by default without gradients, and back as it was."""
    first = next(iter(module.parameters()), None)
    home = torch.device("cpu") if first is None else first.device
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.inference_mode(mode=not gradients):
            yield module.to(device).eval()
    finally:
        module.to(home)
        for part, mode in modes.items():
            part.training = mode


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context that computes in ``"bf16"``, or one that changes nothing for ``"fp32"``."""
    check_choice("precision", precision, ("fp32", "bf16"))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
