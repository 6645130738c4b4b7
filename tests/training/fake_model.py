"""A tiny model that keeps the contract of ``models/base.py``, and slides for it: these tests need no other model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import nn

from stfm.models.base import Embedding, Model
from stfm.models.inputs import InputSpec
from stfm.slide.counts import Counts
from stfm.slide.genes import Panel, Vocabulary
from stfm.slide.slide import Slide

N_GENES = 12
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


@dataclass(frozen=True)
class FakeConfig:
    width: int = 8
    spot_px: int = 6
    niche_px: int = 8
    dropout: float = 0.2
    explode_at: int = -1  # number of calls of losses after which the loss is nan


class FrozenEncoder(nn.Module):
    """Stands for a big pretrained encoder: random, frozen, with a batch norm and a dropout that must stay still."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.conv = nn.Conv2d(3, width, 3)
        self.conv.weight.data = torch.randn(self.conv.weight.shape, generator=generator)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.width = width
        self.n_seen = 0
        self.requires_grad_(False)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        self.n_seen += len(tiles)
        return self.drop(self.norm(self.conv(tiles.float() / 255))).mean((2, 3))


class FakeModel(Model):
    family: ClassVar[str] = "fake"
    config_class: ClassVar[type] = FakeConfig

    def __init__(self, config: FakeConfig, vocabulary: Vocabulary | None, *, pretrained: bool = True) -> None:
        super().__init__(config, vocabulary, pretrained=pretrained)
        width = config.width
        self.image = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(config.dropout))
        self.gene = nn.Linear(len(vocabulary or GENES), width)
        self.niche = FrozenEncoder(width)
        self.niche_map = nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.tensor(0.0))
        self.n_calls = 0
        self.fitted_on: list[str] = []

    @property
    def inputs(self) -> InputSpec:
        config = self.config
        return InputSpec(spot_px=config.spot_px, niche_px=config.niche_px, niche_counts=False)

    def frozen_image_encoder(self, level: str) -> nn.Module | None:
        return self.niche if level == "niche" else None

    def fit_inputs(self, slides) -> None:
        self.fitted_on = [one.slide.name for one in slides]

    def _parts(self, batch):
        image = gene = niche = None
        if batch.spot_tiles is not None:
            image = self.image(batch.spot_tiles.float().mean((2, 3)) / 255)
        if batch.niche_features is not None:
            niche = self.niche_map(batch.niche_features)
        elif batch.niche_tiles is not None:
            niche = self.niche_map(self.niche(batch.niche_tiles))
        if batch.counts is not None:
            gene = self.gene(batch.counts)
        return image, gene, niche

    def losses(self, batch):
        self.n_calls += 1
        image, gene, niche = self._parts(batch)
        spot = ((image - gene) ** 2).mean() * torch.exp(self.temperature) - self.temperature
        context = ((niche - gene) ** 2).mean()
        loss = spot + context
        if self.n_calls - 1 == self.config.explode_at:
            loss = loss * float("nan")
        return {"loss": loss, "spot": spot, "context": context}

    def embed(self, batch) -> Embedding:
        image, gene, niche = self._parts(batch)
        parts = [p for p in (image, gene, niche) if p is not None]
        return Embedding(torch.stack(parts).mean(0), image, gene, niche)


class FakeTiles:
    """Tiles that are known in advance, and a count of how many were read."""

    def __init__(self, n: int, seed: int, rows: np.ndarray | None = None) -> None:
        self.n = n
        self.seed = seed
        self.rows = np.arange(n) if rows is None else rows
        self.n_read = 0

    @property
    def n_obs(self) -> int:
        return len(self.rows)

    def read(self, indices, *, size_um, size_px, out=None):
        self.n_read += len(indices)
        pixels = np.random.default_rng([self.seed, size_px]).integers(0, 256, (self.n, size_px, size_px, 3), np.uint8)
        return np.take(pixels, self.rows[np.asarray(indices)], axis=0, out=out)

    def subset(self, indices) -> FakeTiles:
        return FakeTiles(self.n, self.seed, self.rows[indices])

    def fingerprint(self) -> str:
        return f"fake-{self.n}-{self.seed}"


def make_slide(
    name: str = "S1", n: int = 40, *, seed: int = 0, patient: str | None = None, image: bool = True, gene: bool = True
) -> Slide:
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)[:n] * 100.0
    counts = sparse.csr_matrix(rng.poisson(2.0, (n, N_GENES)).astype(np.float32))
    return Slide(
        name=name,
        coords=grid.astype(np.float64),
        obs_names=np.array([f"{name}-{i}" for i in range(n)]),
        rows=np.arange(n),
        counts=Counts(counts) if gene else None,
        panel=Panel(GENES) if gene else None,
        tiles=FakeTiles(n, seed) if image else None,
        mpp=0.5,
        spot_um=55.0,
        niche_um=255.0,
        patient=patient,
        study="fake-study",
    )


def make_model(seed: int = 0, **config) -> FakeModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return FakeModel(FakeConfig(**config), Vocabulary(GENES))
