"""MobileNetV2 with folded batch norm and TensorFlow's padding, as its int8 release is published."""

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

CHANNELS = (16, 24, 32, 64, 96, 160, 320)
REPEATS = (1, 2, 3, 4, 3, 3, 1)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
HEAD = 1280
FEATURES = {"stages": "stage-means", "last": "mean"}


class SameConv(nn.Module):
    """Convolution with TensorFlow's SAME padding (asymmetric at stride 2), ReLU6 unless linear."""

    def __init__(
        self, in_width: int, out_width: int, *, kernel: int = 1, stride: int = 1, depthwise: bool = False,
        linear: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel, self.stride, self.linear = kernel, stride, linear
        groups = in_width if depthwise else 1
        self.conv = nn.Conv2d(in_width, out_width, kernel, stride, groups=groups)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        if self.kernel > 1:
            top, bottom = self._padding(x.shape[-2])
            left, right = self._padding(x.shape[-1])
            x = F.pad(x, (left, right, top, bottom))
        x = self.conv(x)
        return x if self.linear else F.relu6(x)

    def _padding(self, size: int) -> tuple[int, int]:
        total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2


class InvertedResidual(nn.Module):
    """Expand, filter by channel, project; residual where the shape stays."""

    def __init__(self, in_width: int, out_width: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_width * expansion
        self.expand = SameConv(in_width, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv(hidden, hidden, kernel=3, stride=stride, depthwise=True)
        self.project = SameConv(hidden, out_width, linear=True)
        self.residual = stride == 1 and in_width == out_width

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0; features are means over maps.

    Parameters
    ----------
    features
        An older name of ``pooling``: ``"stages"`` for ``"stage-means"``, ``"last"`` for ``"mean"``.
    pooling, stages
        ``"stage-means"``: the means of all seven stages and of the head, 1,992 numbers (early stages see texture, late
        ones objects); ``"mean"``: of the head alone, 1,280; see :class:`~stfm.encoders.image.pooling.Pooling`.
    classifier
        Build the ImageNet classifier too (:meth:`classify`); otherwise it is dropped from checkpoints.
    """

    def __init__(
        self,
        *,
        features: str = "stages",
        pooling: str | None = None,
        stages: Sequence[int] | None = None,
        classifier: bool = False,
    ) -> None:
        super().__init__()
        kind = pooling or FEATURES[check_choice("features", features, tuple(FEATURES))]
        self.pool = Pooling(kind, widths=[*CHANNELS, HEAD], stages=stages)
        self.stem = SameConv(3, 32, kernel=3, stride=2)
        in_width = 32
        for i, (width, repeats, stride) in enumerate(zip(CHANNELS, REPEATS, STRIDES, strict=True)):
            blocks = []
            for j in range(repeats):
                step = stride if j == 0 else 1
                blocks.append(InvertedResidual(in_width, width, stride=step, expansion=6 if i else 1))
                in_width = width
            self.add_module(f"s{i + 1}", nn.Sequential(*blocks))
        self.head = SameConv(in_width, HEAD)
        self.classifier = nn.Linear(HEAD, 1001) if classifier else None
        self.layouts = (KeyMap("folded", dropped=() if classifier else (r"classifier\..+",)),)
        self.width = self.pool.width

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        maps = self._maps(x)
        stages = [self.pool.moments(one) for i, one in enumerate(maps) if self.pool.takes(i)]
        return self.pool.join(stages, patches=maps[-1])

    def _maps(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for i in range(len(CHANNELS)):
            x = self.get_submodule(f"s{i + 1}")(x)
            maps.append(x)
        return [*maps, self.head(x)]

    def classify(self, x: Tensor) -> Tensor:
        """Return the logits of ImageNet's classes (0 is background), ``(b, 1001)``."""
        if self.classifier is None:
            msg = "This MobileNetV2 has no classifier; build it with classifier=True."
            raise InputError(msg)
        return self.classifier(self._maps(x)[-1].mean(dim=(2, 3)))  # type: ignore[no-any-return]


def mobilenetv2(
    spec: EncoderSpec,
    *,
    features: str = "stages",
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
    classifier: bool = False,
) -> ImageEncoder:
    """Build a MobileNetV2; options as in :class:`MobileNetV2`."""
    backbone = MobileNetV2(
        features=features,
        pooling=pooling or (None if features == "last" else spec.pooling or None),
        stages=stages,
        classifier=classifier,
    )
    return ImageEncoder(spec, backbone, width=backbone.width)
