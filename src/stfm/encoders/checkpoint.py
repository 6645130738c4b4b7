"""Weights files of encoders: found, opened safely, brought to the names of stfm, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stfm._errors import DataIntegrityError
from stfm.weights.state import read_state, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["load_strictly"]

#: what stands before the place of weights that are fetched
REMOTE = ("hub:", "https://", "http://")


def load_strictly(
    backbone: nn.Module, source: str | Path | Mapping[str, Tensor], *, name: str, gated: bool = False
) -> None:
    """Load a checkpoint in a published layout; a key too few, too many or of another shape is refused.

    Parameters
    ----------
    backbone
        The network; it may offer ``layouts`` (key maps) or ``convert_state``.
    source
        A file, ``"hub:owner/repository/file"``, a URL, or a state dict.
    name
        Name of the encoder, for messages.
    gated
        Whether its publisher asks for an account.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    nested = hasattr(backbone, "convert_state")  # which knows what its publisher's files hold beside weights
    if isinstance(source, Mapping):
        state = unwrap(source, where, nested=nested)
    else:
        state = read_state(_local(source, gated=gated), nested=nested)
    if nested:
        state = unwrap(cast("Any", backbone).convert_state(state), where)
    for layout in getattr(backbone, "layouts", ()):
        if layout.matches(state):
            state = layout.read(state)
            break
    own = backbone.state_dict()
    missing = [k for k in own if k not in state and "lora_" not in k]
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    extra = [k for k in state if k not in own]
    if missing or wrong or extra:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("of another shape", wrong), ("unknown", extra))
            if keys
        ]
        msg = f"{where} does not hold weights of encoder {name!r}: {'; '.join(parts)}."
        raise DataIntegrityError(msg)
    backbone.load_state_dict(state, strict=False)


def _local(source: str | Path, *, gated: bool) -> Path:
    """Return where a file lies on this machine; what lies elsewhere is fetched."""
    if isinstance(source, str) and source.startswith(REMOTE):
        from stfm.weights import locate

        return Path(locate(source, gated=gated))
    return Path(source)
