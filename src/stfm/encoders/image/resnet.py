"""Residual networks in plain PyTorch, parameters named as in torchvision (ST-Align's AE-Img, eq. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.pooling import Pooling
from stfm.encoders.keymap import KeyMap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec

STEMS = ("imagenet", "cifar")
NORMS = ("batch", "group")


def make_norm(kind: str, channels: int) -> nn.Module:
    """Return batch or group normalisation (16 channels a group, or fewer)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    groups = max(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= min(8, channels))
    return nn.GroupNorm(groups, channels)


class Basic(nn.Module):
    """Two 3 × 3 convolutions with a residual."""

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = make_norm(norm, width)
        self.downsample = _shortcut(in_width, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        short = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + short)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 convolutions with a residual; the stride is in the middle one."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = make_norm(norm, width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = make_norm(norm, 4 * width)
        self.downsample = _shortcut(in_width, 4 * width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        short = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + short)


def _shortcut(in_width: int, out_width: int, stride: int, norm: str) -> nn.Sequential | None:
    if stride == 1 and in_width == out_width:
        return None
    return nn.Sequential(nn.Conv2d(in_width, out_width, 1, stride, bias=False), make_norm(norm, out_width))


class ResNet(nn.Module):
    """Residual network without classifier: the mean over the last map.

    Parameters
    ----------
    block
        ``"basic"`` or ``"bottleneck"``.
    depths, widths
        Blocks and base widths of the four stages.
    stem
        ``"imagenet"``: 7 × 7 with stride 2 and max-pooling (of 28 px, the last stage sees one pixel); ``"cifar"``:
        3 × 3 with stride 1, which keeps the resolution of small tiles at 16 times the cost.
    norm
        ``"batch"`` (converts to synchronised batch norm) or ``"group"`` (does not look at the batch).
    pooling, stages
        See :class:`~stfm.encoders.image.pooling.Pooling`; stages are ``layer1`` to ``layer4``.
    """

    layouts = (KeyMap("torchvision", dropped=(r"fc\..+",)),)

    def __init__(
        self,
        *,
        block: str,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: str = "imagenet",
        norm: str = "batch",
        pooling: str = "mean",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_choice("block", block, ("basic", "bottleneck"))
        check_choice("stem", stem, STEMS)
        check_choice("norm", norm, NORMS)
        if len(depths) != len(widths) or not 1 <= len(depths) <= 4:
            msg = f"depths and widths must be equally long, one to four stages, got {depths} and {widths}."
            raise InputError(msg)
        unit = Bottleneck if block == "bottleneck" else Basic
        first = widths[0]
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, first, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = make_norm(norm, first)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        in_width = first
        self.n_stages = len(depths)
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                blocks.append(unit(in_width, width, 2 if i > 0 and j == 0 else 1, norm))
                in_width = width * unit.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.pool = Pooling(pooling, widths=[w * unit.expansion for w in widths], stages=stages)
        self.width = self.pool.width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        stages = []
        for i in range(self.n_stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
            if self.pool.takes(i):
                stages.append(self.pool.moments(x))
        return self.pool.join(stages, patches=x)


def resnet(
    spec: EncoderSpec,
    *,
    block: str = "bottleneck",
    depths: Sequence[int] = (3, 4, 6, 3),
    widths: Sequence[int] = (64, 128, 256, 512),
    stem: str = "imagenet",
    norm: str = "batch",
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build a residual network; options as in :class:`ResNet`."""
    backbone = ResNet(
        block=block,
        depths=depths,
        widths=widths,
        stem=stem,
        norm=norm,
        pooling=pooling or spec.pooling or "mean",
        stages=stages,
    )
    return ImageEncoder(spec, backbone, width=backbone.width)
