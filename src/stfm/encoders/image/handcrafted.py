"""Colour, stain, gradient and texture statistics of a tile: 67 numbers, no weights, all tiles at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.encoders.base import ImageEncoder

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec

N_FEATURES = 67
#: optical density of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston, 2001)
HED = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
EPS = 1e-6


class HandcraftedFeatures(nn.Module):
    """67 statistics of RGB tiles.

    Means and deviations of colour (6), optical density and saturation (4), stains with quantiles (15), quantiles of
    grey (5), shares of tissue, white and nuclei (3), gradients at three scales (12), local deviations (8), correlations
    (3), autocorrelation of haematoxylin (4), coherence of orientation (2), blobs (2), centre against whole (3).
    """

    unmix: Tensor
    quantiles: Tensor

    def __init__(self) -> None:
        super().__init__()
        stains = F.normalize(torch.tensor(HED, dtype=torch.float32), dim=1)
        self.register_buffer("unmix", _inverse3(stains), persistent=False)
        self.register_buffer("quantiles", torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        """Return ``(b, 67)`` from float tiles in 0..1, ``(b, 3, h, w)``."""
        if min(rgb.shape[-2:]) < 8:
            msg = f"tiles must be at least 8 px wide, got {tuple(rgb.shape[-2:])}."
            raise InputError(msg)
        dtype = rgb.dtype
        with torch.autocast(rgb.device.type, enabled=False):  # differences of optical densities need 32 bits
            rgb = rgb.float()
            density = -torch.log10((rgb * 255 + 1) / 256)
            stains = torch.einsum("bchw,cs->bshw", density, self.unmix.float())
            grey = rgb.mean(dim=1, keepdim=True)
            parts = [
                self._colour(rgb, density, grey, stains),
                self._gradients(stains[:, :2]),
                self._texture(torch.cat([stains[:, :1], grey], dim=1)),
                self._relations(rgb, stains),
                self._layout(stains, grey, density),
            ]
        return torch.cat(parts, dim=1).to(dtype)

    def _colour(self, rgb: Tensor, density: Tensor, grey: Tensor, stains: Tensor) -> Tensor:
        total = density.mean(dim=1, keepdim=True)
        saturation = (rgb.amax(dim=1, keepdim=True) - rgb.amin(dim=1, keepdim=True)) / (
            rgb.amax(dim=1, keepdim=True) + EPS
        )
        maps = torch.cat([rgb, total, saturation, stains], dim=1)
        step = 2 if rgb.shape[-1] >= 64 else 1  # a quarter of the pixels gives the same quantiles
        thinned = torch.cat([stains, grey], dim=1)[..., ::step, ::step].flatten(2)
        # (5, b, 4): all quantiles of grey, three of each stain
        q = torch.quantile(thinned, self.quantiles.to(thinned.dtype), dim=2)
        shares = [
            torch.sigmoid((total - 0.06) / 0.02).mean(dim=(2, 3)),
            torch.sigmoid((grey - 0.86) / 0.02).mean(dim=(2, 3)),
            torch.sigmoid((stains[:, :1] - 0.25) / 0.05).mean(dim=(2, 3)),
        ]
        return torch.cat([maps.mean(dim=(2, 3)), _deviation(maps), *q[::2, :, :3], *q[:, :, 3:], *shares], dim=1)

    def _gradients(self, maps: Tensor) -> Tensor:
        parts = []
        for scale in (1, 2, 4):
            x = F.avg_pool2d(maps, scale) if scale > 1 else maps
            dy, dx = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
            size = (dx.square() + dy.square() + EPS).sqrt()
            parts += [size.mean(dim=(2, 3)), _deviation(size)]
        return torch.cat(parts, dim=1)

    def _texture(self, maps: Tensor) -> Tensor:
        parts = []
        square = maps.square()
        for window in (3, 7, 15):
            mean = _windows(maps, window)
            local = (_windows(square, window) - mean.square()).clamp_min(0).sqrt()
            parts.append(local.mean(dim=(2, 3)))
            if window == 7:
                parts.append(_deviation(local))
        return torch.cat(parts, dim=1)

    def _relations(self, rgb: Tensor, stains: Tensor) -> Tensor:
        haematoxylin = stains[:, 0]
        pairs = ((haematoxylin, stains[:, 1]), (rgb[:, 0], rgb[:, 1]), (rgb[:, 1], rgb[:, 2]))
        parts = [_correlation(a, b) for a, b in pairs]
        for lag in (1, 2, 4, 8):
            if lag >= min(haematoxylin.shape[-2:]):
                parts.append(torch.zeros_like(parts[0]))
                continue
            down = _correlation(haematoxylin[:, lag:], haematoxylin[:, :-lag])
            right = _correlation(haematoxylin[:, :, lag:], haematoxylin[:, :, :-lag])
            parts.append((down + right) / 2)
        return torch.stack(parts, dim=1)

    def _layout(self, stains: Tensor, grey: Tensor, density: Tensor) -> Tensor:
        maps = torch.cat([stains[:, :1], grey], dim=1)
        dy, dx = maps[..., 1:, :-1] - maps[..., :-1, :-1], maps[..., :-1, 1:] - maps[..., :-1, :-1]
        xx, yy = dx.square().mean(dim=(2, 3)), dy.square().mean(dim=(2, 3))
        xy = (dx * dy).mean(dim=(2, 3))
        coherence = ((xx - yy).square() + 4 * xy.square() + EPS**2).sqrt() / (xx + yy + EPS)
        fine = F.avg_pool2d(stains[:, :1], 3, ceil_mode=True)
        blobs = fine - F.avg_pool2d(fine, 3, stride=1, padding=1, count_include_pad=False)  # 3 px against 9 px
        h, w = grey.shape[-2:]
        shown = torch.cat([stains[:, :2], density.mean(dim=1, keepdim=True)], dim=1)
        centre = shown[..., h // 4 : h - h // 4, w // 4 : w - w // 4]
        contrast = centre.mean(dim=(2, 3)) - shown.mean(dim=(2, 3))
        return torch.cat([coherence, blobs.abs().mean(dim=(2, 3)), _deviation(blobs), contrast], dim=1)


def _inverse3(m: Tensor) -> Tensor:
    """Inverse of a 3 × 3 matrix by cofactors: works on every device, the meta device too."""
    a, b, c = m
    columns = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=1)
    determinant = torch.dot(a, torch.linalg.cross(b, c))
    return torch.div(columns, determinant)


def _deviation(maps: Tensor) -> Tensor:
    x = maps.flatten(2)
    return (x - x.mean(dim=2, keepdim=True)).square().mean(dim=2).sqrt()


def _windows(maps: Tensor, window: int) -> Tensor:
    """Means over square windows that overlap by half."""
    window = min(window, *maps.shape[-2:])
    return F.avg_pool2d(maps, window, stride=window // 2)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).mean(dim=1) / (a.square().mean(dim=1) * b.square().mean(dim=1) + EPS**2).sqrt()


def handcrafted(spec: EncoderSpec) -> ImageEncoder:
    """Build the statistics; there are no options."""
    return ImageEncoder(spec, HandcraftedFeatures(), width=N_FEATURES)
