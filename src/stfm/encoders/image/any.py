"""Image encoders from elsewhere: any model of timm, any callable."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch
from torch import Tensor, nn

from stfm._errors import InputError, WrongTypeError
from stfm._optional import require
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.pooling import Pooling
from stfm.encoders.keymap import KeyMap
from stfm.encoders.spec import INTERPOLATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stfm.encoders.spec import EncoderSpec

#: side of the tile that a callable of any size is probed with, px
PROBE_PX = 64


class TimmBackbone(nn.Module):
    """A model of timm without classifier.

    Parameters
    ----------
    model
        The model; what it returns is the feature.
    classifiers
        Names of its classifier, which checkpoints hold and features do not need.
    pooling
        ``"own"``: what the model returns; ``"stages"`` and ``"stage-means"``: moments of its intermediate maps.
    stages
        Positions of these maps.
    input_px
        Side of the tiles.
    """

    def __init__(
        self, model: nn.Module, classifiers: tuple[str, ...], pooling: str, stages: Sequence[int] | None, input_px: int
    ) -> None:
        super().__init__()
        self.model = model
        widths = [int(cast("Any", model).num_features)]
        if pooling != "own":
            with torch.no_grad():
                probe = torch.zeros(1, 3, input_px, input_px)
                widths = [one.shape[1] for one in self._maps(probe, None)]
        self.pool = Pooling(pooling, widths=widths, own=int(cast("Any", model).num_features), stages=stages)
        self.layouts = (
            KeyMap("timm", renames=(("{s}", "model.{s}"),), dropped=tuple(rf"{name}\..+" for name in classifiers)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        if self.pool.kind == "own":
            return self.model(x)  # type: ignore[no-any-return]
        maps = self._maps(x, list(self.pool.stages) or [-1])
        return self.pool.join([self.pool.moments(one) for one in maps], patches=maps[-1])

    def _maps(self, x: Tensor, which: list[int] | None) -> list[Tensor]:
        intermediates = getattr(self.model, "forward_intermediates", None)
        if intermediates is None:
            msg = f"{type(self.model).__name__} of timm does not tell its stages; use pooling='own'."
            raise InputError(msg)
        return list(intermediates(x, indices=which, norm=False, intermediates_only=True, output_fmt="NCHW"))


def from_timm(
    spec: EncoderSpec,
    *,
    model: str,
    pretrained: bool = False,
    pooling: str = "own",
    stages: Sequence[int] | None = None,
    **arguments: Any,
) -> ImageEncoder:
    """Build a model of timm; input size, channel statistics and interpolation are timm's unless given.

    Parameters
    ----------
    spec
        From :func:`stfm.encoders.registry.timm_spec`.
    model
        timm's name.
    pretrained
        Let timm fetch its own weights.
    pooling, stages
        As of :class:`TimmBackbone`.
    arguments
        Of ``timm.create_model``.
    """
    timm = require("timm", extra="encoders")
    try:
        network = timm.create_model(model, pretrained=pretrained, num_classes=0, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        msg = f"timm cannot make {model!r} ({error}); timm.list_models() names what it has."
        raise InputError(msg) from error
    config = timm.data.resolve_data_config({}, model=network)
    same = type(spec)  # what is still as the class has it, timm tells
    known: dict[str, Any] = {
        "input_px": spec.input_px or int(config["input_size"][1]),
        "mean": config["mean"] if spec.mean == same.mean else spec.mean,
        "std": config["std"] if spec.std == same.std else spec.std,
    }
    if spec.interpolation == same.interpolation and config["interpolation"] in INTERPOLATIONS:
        known["interpolation"] = config["interpolation"]
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    backbone = TimmBackbone(network.eval(), names, pooling, stages, known["input_px"])
    width = backbone.pool.width
    return ImageEncoder(replace(spec, width=width, pooling=pooling, **known), backbone, width=width)


class Wrapped(nn.Module):
    """A callable as a backbone.

    Parameters
    ----------
    function
        Tiles -> features; its parameters are trained where it is a module.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        # What a function does cannot be hashed, so features of it are never taken from the disk again.
        self.mark = "" if isinstance(function, nn.Module) else uuid4().hex
        if isinstance(function, nn.Module):
            self.layouts = (KeyMap("the module's own", renames=(("{s}", "function.{s}"),)),)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        out = self.function(x)
        if not isinstance(out, torch.Tensor):
            try:
                out = torch.as_tensor(out, dtype=x.dtype, device=x.device)
            except (TypeError, ValueError, RuntimeError) as error:
                msg = f"A callable encoder must return a tensor (b, f), got {type(out).__name__}."
                raise WrongTypeError(msg) from error
        if out.ndim != 2 or len(out) != len(x):
            msg = (
                f"A callable encoder must return (b, f) of {len(x)} tiles, got {tuple(out.shape)}; pool it to vectors."
            )
            raise InputError(msg)
        return out

    def extra_repr(self) -> str:
        """Return what tells one function from another."""
        kind = type(self.function)
        return f"{kind.__module__}.{kind.__qualname__}{self.mark}"


class CallableEncoder(ImageEncoder):
    """A callable whose fingerprint says which it is."""

    def extra_repr(self) -> str:
        """Return the encoder's and the callable's description."""
        return f"{super().extra_repr()}, {self.backbone.extra_repr()}"


def from_callable(spec: EncoderSpec, *, function: Callable[[Tensor], Tensor]) -> ImageEncoder:
    """Wrap a callable; its width is found by encoding one white tile.

    Parameters
    ----------
    spec
        From :func:`stfm.encoders.registry.custom_spec`, with the options of how tiles are prepared.
    function
        Tiles ``(b, 3, h, w)`` -> features ``(b, f)``.
    """
    backbone = Wrapped(function)
    side = spec.input_px or PROBE_PX
    weights = next(iter(backbone.parameters()), None)
    probe = torch.ones(1, 3, side, side, device=None if weights is None else weights.device)
    training = backbone.training
    with torch.no_grad():
        width = backbone.eval()(probe).shape[1]
    backbone.train(training)
    trained = isinstance(function, nn.Module)
    spec = replace(spec, width=width, source="published" if trained else "formula")
    return CallableEncoder(spec, backbone, width=width)
