"""Weights files of encoders: found, opened safely, brought to the names of stfm, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stfm._errors import DataIntegrityError
from stfm.weights.state import check_finite, check_there, read_state, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["check_found", "load_strictly"]

#: what stands before the place of weights that are fetched
REMOTE = ("hub:", "https://", "http://")
#: the weights of a saved model, and what stands before those of an encoder in it
SAVED, INSIDE = "model.safetensors", "encoder.backbone."


def load_strictly(
    backbone: nn.Module, source: str | Path | Mapping[str, Tensor], *, name: str, gated: bool = False
) -> None:
    """Load a checkpoint in a published layout; a key too few, too many or of another shape is refused, and so is NaN.

    Parameters
    ----------
    backbone
        The network; it may offer ``layouts`` (key maps) or ``convert_state``.
    source
        A file, ``"hub:owner/repository/file"``, a URL, a state dict; or a saved model whose image encoder is of this
        kind: its folder, or its name in :func:`stfm.weights.list_weights`.
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
        path = _local(source, gated=gated)
        state = _of_saved_model(path) if path.is_dir() else read_state(path, nested=nested)
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
    check_finite(state, where)
    backbone.load_state_dict(state, strict=False)


def _of_saved_model(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the image encoder of a saved model."""
    state = read_state(folder / SAVED)
    inside = {k.partition(INSIDE)[2]: v for k, v in state.items() if k.startswith("image.") and INSIDE in k}
    if not inside:
        msg = f"{folder} holds a saved model without an image encoder; name the file of an encoder's weights."
        raise DataIntegrityError(msg)
    return inside


def check_found(source: str | Path | Mapping[str, Tensor]) -> None:
    """Refuse a file of weights that is not there, before a network is made for it.

    Parameters
    ----------
    source
        As of :func:`load_strictly`; what is fetched is not looked for.
    """
    if not isinstance(source, Mapping) and not _is_fetched(source):
        check_there(Path(source).expanduser())


def _is_fetched(source: str | Path) -> bool:
    """Return whether weights are named by an address or a row of the table of weights."""
    from stfm.weights import WEIGHTS

    return isinstance(source, str) and (source.startswith(REMOTE) or source in WEIGHTS)


def _local(source: str | Path, *, gated: bool) -> Path:
    """Return where a file or a folder lies on this machine; what lies elsewhere is fetched."""
    from stfm.weights import locate

    return Path(locate(str(source), gated=gated)) if _is_fetched(source) else Path(source).expanduser()
