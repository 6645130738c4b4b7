"""The image tower that stfm trains itself: MobileNetV2 beside statistics of colour, stain and texture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.handcrafted import N_FEATURES, HandcraftedFeatures
from stfm.encoders.image.mobilenet import MobileNetV2

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec


class Tower(nn.Module):
    """Means of every stage of a MobileNetV2, and the 67 statistics of :class:`HandcraftedFeatures`.

    The statistics keep what the network is trained to forget: the stains.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = MobileNetV2(features="stages")
        self.statistics = HandcraftedFeatures()
        self.width = self.trunk.width + N_FEATURES

    def forward(self, rgb: Tensor) -> Tensor:
        """Return ``(b, 2059)`` from float tiles in 0..1, ``(b, 3, h, w)``."""
        return torch.cat([self.trunk(2 * rgb - 1), self.statistics(rgb)], dim=1)


def tower(spec: EncoderSpec) -> ImageEncoder:
    """Build the tower; there are no options."""
    backbone = Tower()
    return ImageEncoder(spec, backbone, width=backbone.width)
