"""MobileNetV2 with folded batch norm and TensorFlow's padding, as its int8 release is published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice
from stfm.encoders.base import ImageEncoder

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec

CHANNELS = (16, 24, 32, 64, 96, 160, 320)
REPEATS = (1, 2, 3, 4, 3, 3, 1)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
FEATURES = ("stages", "last")


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
        ``"stages"``: the means of all seven stages and of the head, 1,992 numbers (early stages see texture, late
        ones objects); ``"last"``: of the head alone, 1,280.
    classifier
        Build the ImageNet classifier too (:meth:`classify`); otherwise it is dropped from checkpoints.
    """

    def __init__(self, *, features: str = "stages", classifier: bool = False) -> None:
        super().__init__()
        self.features = check_choice("features", features, FEATURES)
        self.stem = SameConv(3, 32, kernel=3, stride=2)
        in_width = 32
        for i, (width, repeats, stride) in enumerate(zip(CHANNELS, REPEATS, STRIDES, strict=True)):
            blocks = []
            for j in range(repeats):
                step = stride if j == 0 else 1
                blocks.append(InvertedResidual(in_width, width, stride=step, expansion=6 if i else 1))
                in_width = width
            self.add_module(f"s{i + 1}", nn.Sequential(*blocks))
        self.head = SameConv(in_width, 1280)
        self.classifier = nn.Linear(1280, 1001) if classifier else None
        self.width = 1280 if features == "last" else sum(CHANNELS) + 1280

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        x = self.stem(x)
        means = []
        for i in range(len(CHANNELS)):
            x = self.get_submodule(f"s{i + 1}")(x)
            if self.features == "stages":
                means.append(x.mean(dim=(2, 3)))
        means.append(self.head(x).mean(dim=(2, 3)))
        return torch.cat(means, dim=1)

    def classify(self, x: Tensor) -> Tensor:
        """Return the logits of ImageNet's classes (0 is background), ``(b, 1001)``."""
        if self.classifier is None:
            msg = "This MobileNetV2 has no classifier; build it with classifier=True."
            raise InputError(msg)
        return self.classifier(self(x)[:, -1280:])  # type: ignore[no-any-return]

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the classifier of a checkpoint unless it was asked for."""
        keep = self.classifier is not None
        return {k: v for k, v in state.items() if keep or not k.startswith("classifier.")}


def mobilenetv2(spec: EncoderSpec, *, features: str = "stages", classifier: bool = False) -> ImageEncoder:
    """Build a MobileNetV2; options as in :class:`MobileNetV2`."""
    backbone = MobileNetV2(features=features, classifier=classifier)
    return ImageEncoder(spec, backbone, width=backbone.width)
