"""STORM's spot level: one token of H&E and one of expression a spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.nn.principal import leading_components

if TYPE_CHECKING:
    from stfm.encoders.base import ImageEncoder
    from stfm.models.storm_config import STORMConfig
    from stfm.nn.batch import Batch

_FLAT = 1e-4
_CLIP = 10.0


class FeatureScaler(nn.Module):
    """Image features on one scale: standardised, and rotated to their principal components.

    The components are divided by one number, their root mean square, so that the leading ones keep their weight.

    Parameters
    ----------
    in_width, n_components
        Features, and how many components are kept; 0 standardises alone.
    """

    centre: Tensor
    scale: Tensor
    components: Tensor

    def __init__(self, in_width: int, n_components: int) -> None:
        super().__init__()
        self.n_components = min(n_components, in_width)
        self.register_buffer("centre", torch.zeros(in_width))
        self.register_buffer("scale", torch.ones(in_width))
        rows = torch.eye(in_width)[: self.n_components]
        self.register_buffer("components", rows)

    @property
    def width(self) -> int:
        """Width of the result."""
        return self.n_components or len(self.centre)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take means, deviations and components from features of training spots, ``(n, f)``."""
        x = features.double()
        deviation = x.std(dim=0, correction=0)
        self.centre.copy_(x.mean(dim=0))
        self.scale.copy_(torch.where(deviation > _FLAT * self.centre.abs().clamp_min(1.0), deviation, 1.0))
        if not self.n_components:
            return
        z = (features - self.centre) / self.scale
        rank = min(self.n_components, min(z.shape) - 1)
        spread, directions = leading_components(z.float(), rank)
        self.components.zero_()
        self.components[:rank] = directions / spread.square().mean().sqrt().clamp_min(1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        z = (features - self.centre) / self.scale
        return z @ self.components.T if self.n_components else z.clamp(-_CLIP, _CLIP)


class ImageTokens(nn.Module):
    """Tiles, or features of a frozen encoder, to one token a spot.

    Parameters
    ----------
    encoder
        Encoder of the slot.
    config
        Contexts, scaling and width.
    """

    def __init__(self, encoder: ImageEncoder, config: STORMConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.n_contexts = len(config.contexts_um)
        width = encoder.width * self.n_contexts
        self.raw_width = width
        # What a trained encoder gives changes with it: running statistics, and no rotation to components.
        self.scaler: nn.Module
        if encoder.frozen:
            self.scaler = FeatureScaler(width, config.feature_components)
            self.width = self.scaler.width
        else:
            self.scaler = nn.BatchNorm1d(width, affine=False)
            self.width = width
        self.project = nn.Sequential(nn.Dropout(config.feature_dropout), nn.Linear(self.width, config.width))

    def features(self, batch: Batch) -> Tensor | None:
        """Return scaled features of the batch's spots, ``(n, width)``; None without H&E."""
        raw = batch.spot_features
        if raw is None and batch.spot_tiles is not None:
            raw = self.encode(batch.spot_tiles, batch.spot_mpp)
        elif raw is not None and not self.encoder.frozen:
            msg = (
                f"The batch holds precomputed image features, but encoder {self.encoder.spec.name!r} is not frozen "
                f"(mode={self.encoder.mode!r}); give tiles."
            )
            raise InputError(msg)
        return None if raw is None else self.scaled(raw)

    def scaled(self, raw: Tensor) -> Tensor:
        """Return features on one scale, ``(n, width)``; what was scaled before stays."""
        if self.encoder.frozen and raw.shape[1] == self.width != self.raw_width:
            return raw
        scaled: Tensor = self.scaler(raw)
        return scaled

    def encode(self, tiles: Tensor, mpp: Tensor | None = None) -> Tensor:
        """Return the features of all contexts of a spot side by side, ``(n, c f)``; ``mpp`` is their µm/px."""
        if tiles.ndim == 4:
            tiles = tiles[:, None]
        if tiles.shape[1] != self.n_contexts:
            msg = f"the model reads {self.n_contexts} tiles a spot, got {tiles.shape[1]}."
            raise InputError(msg)
        features = self.encoder(tiles.flatten(0, 1), None if mpp is None else mpp.flatten())
        return features.unflatten(0, (-1, self.n_contexts)).flatten(1)  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """Return tokens, ``(n, d)``, of scaled features."""
        return self.project(features)  # type: ignore[no-any-return]
