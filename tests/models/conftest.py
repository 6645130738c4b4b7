"""Made-up spots for the tests of models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stfm.nn.batch import Batch
from stfm.slide.genes import Vocabulary

N_GENES = 60


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(np.array([f"GENE{i}" for i in range(N_GENES)]))


@pytest.fixture
def make_batch():
    """Return a function that makes the batch that a model wants to see."""

    def make(model, n: int = 8, *, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        spec = model.inputs

        def tiles(px: int | None) -> torch.Tensor | None:
            if px is None:
                return None
            return torch.randint(0, 256, (n, 3, px, px), generator=generator, dtype=torch.uint8)

        def genes(wanted: bool) -> torch.Tensor | None:
            values = 3 * torch.rand(n, N_GENES, generator=generator)
            return values * (torch.rand(n, N_GENES, generator=generator) > 0.5) if wanted else None

        number = torch.arange(n)
        return Batch(
            spot_tiles=tiles(spec.spot_px),
            niche_tiles=tiles(spec.niche_px),
            counts=genes(spec.counts),
            niche_counts=genes(spec.niche_counts),
            xy_um=torch.rand(n, 2, generator=generator),
            slide_id=number % 2,
            index=number // 2,
            niche_index=torch.stack([number // 2 + 1, number // 2 + 2], dim=1),
        )

    return make
