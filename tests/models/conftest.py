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

        def tiles(px: int | None, contexts: tuple[float, ...] = ()) -> torch.Tensor | None:
            if px is None:
                return None
            shape = (n, len(contexts), 3, px, px) if contexts else (n, 3, px, px)
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        def genes(wanted: bool) -> torch.Tensor | None:
            values = 3 * torch.rand(n, N_GENES, generator=generator)
            return values * (torch.rand(n, N_GENES, generator=generator) > 0.5) if wanted else None

        number = torch.arange(n)
        windows = (
            None if spec.window is None else torch.stack([(number + i) % n for i in range(min(spec.window, 7))], dim=1)
        )
        if windows is not None:
            windows[:, 1:] = torch.where(windows[:, 1:] == 0, -1, windows[:, 1:])  # as at the border of a tissue
        return Batch(
            spot_tiles=tiles(spec.spot_px, spec.contexts_um),
            niche_tiles=tiles(spec.niche_px),
            counts=genes(spec.counts),
            niche_counts=genes(spec.niche_counts),
            totals=1000 + 9000 * torch.rand(n, generator=generator) if spec.gene else None,
            xy_um=100 * torch.rand(n, 2, generator=generator),
            slide_id=number % 2,
            index=number // 2,
            niche_index=torch.stack([number // 2 + 1, number // 2 + 2], dim=1),
            window=windows,
        )

    return make
