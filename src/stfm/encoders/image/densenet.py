"""DenseNet in plain PyTorch, parameters named as in torchvision (ST-Net's backbone)."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.layouts import DENSENET_LAYOUTS
from stfm.encoders.image.pooling import Pooling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


class DenseLayer(nn.Module):
    """Norm, 1 × 1, norm, 3 × 3; what it gives is put beside what it read."""

    def __init__(self, in_width: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map with ``growth`` more channels."""
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], dim=1)


class Transition(nn.Module):
    """Half the channels, half the resolution."""

    def __init__(self, in_width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_width)
        self.conv = nn.Conv2d(in_width, in_width // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet without classifier; the mean over the last map after ReLU.

    Parameters
    ----------
    growth, bottleneck
        Channels that a layer adds; width of its 1 × 1 convolution in these.
    depths
        Layers of the blocks.
    first
        Channels of the first convolution.
    pooling, stages
        See :class:`~stfm.encoders.image.pooling.Pooling`; stages are the dense blocks.
    """

    layouts = DENSENET_LAYOUTS

    def __init__(
        self,
        *,
        growth: int = 32,
        bottleneck: int = 4,
        depths: Sequence[int] = (6, 12, 24, 16),
        first: int = 64,
        pooling: str = "mean",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, first, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(first),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        width, widths = first, []
        for i, depth in enumerate(depths, start=1):
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                (f"denselayer{j + 1}", DenseLayer(width + j * growth, growth, bottleneck)) for j in range(depth)
            )
            width += depth * growth
            widths.append(width)
            parts[f"denseblock{i}"] = nn.Sequential(layers)
            if i < len(depths):
                parts[f"transition{i}"] = Transition(width)
                width //= 2
        parts["norm5"] = nn.BatchNorm2d(width)
        self.features = nn.Sequential(parts)
        self.pool = Pooling(pooling, widths=widths, stages=stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        stages = []
        for name, part in self.features.named_children():
            x = part(x)
            if name.startswith("denseblock") and self.pool.takes(int(name.removeprefix("denseblock")) - 1):
                stages.append(self.pool.moments(x))
        return self.pool.join(stages, patches=F.relu(x))


def densenet(
    spec: EncoderSpec,
    *,
    growth: int = 32,
    bottleneck: int = 4,
    depths: Sequence[int] = (6, 12, 24, 16),
    first: int = 64,
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build a DenseNet; options as in :class:`DenseNet`."""
    backbone = DenseNet(
        growth=growth,
        bottleneck=bottleneck,
        depths=depths,
        first=first,
        pooling=pooling or spec.pooling or "mean",
        stages=stages,
    )
    return ImageEncoder(spec, backbone, width=backbone.pool.width)
