"""A plain convolutional network for spot tiles, light enough to train on two cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm._validate import check_choice
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.pooling import Pooling
from stfm.encoders.image.resnet import NORMS, make_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


class PlainCNN(nn.Module):
    """Stages of one 3 × 3 convolution, each halving the resolution; mean and maximum over the last map.

    Parameters
    ----------
    widths
        Channels of the stages.
    norm
        ``"batch"`` or ``"group"``.
    pooling, stages
        ``"own"``: mean and maximum over the last map; see :class:`~stfm.encoders.image.pooling.Pooling`.
    """

    def __init__(
        self, widths: Sequence[int], *, norm: str = "batch", pooling: str = "own", stages: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        layers: list[nn.Module] = []
        in_width = 3
        for width in widths:
            conv = nn.Conv2d(in_width, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, make_norm(norm, width), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)]
            in_width = width
        self.layers = nn.Sequential(*layers[:-1])
        self.pool = Pooling(pooling, widths=list(widths), own=2 * in_width, stages=stages)
        self.width = self.pool.width

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        stages: list[Tensor] = []
        seen = 0
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                if self.pool.takes(seen):
                    stages.append(self.pool.moments(x))
                seen += 1
        # What is typical and what is extreme in the spot (a nucleus in stroma) are both told.
        own = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1) if self.pool.kind == "own" else None
        return self.pool.join(stages, patches=x, own=own)


def plain_cnn(
    spec: EncoderSpec,
    *,
    widths: Sequence[int] = (16, 32, 64, 64),
    norm: str = "batch",
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build a plain network; options as in :class:`PlainCNN`."""
    backbone = PlainCNN(widths, norm=norm, pooling=pooling or spec.pooling or "own", stages=stages)
    return ImageEncoder(spec, backbone, width=backbone.width)
