"""Which spots make up a batch: seeded by epoch, so that a resumed run sees what an unbroken one would."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stfm._errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Pick", "SpotSampler"]


class Pick(NamedTuple):
    """Spots of one slide within a batch."""

    slide: int
    indices: NDArray[np.int64]


class SpotSampler:
    """Cuts the spots of several slides into batches.

    Every spot is used once an epoch (several devices drop the few batches that do not divide evenly). Batches are cut
    nearly equal instead of leaving a small last one, since a contrastive loss over three spots says little. Within a
    batch spots are sorted, so that tiles and counts are read in their order on disk; no loss depends on the order.

    Parameters
    ----------
    sizes
        Number of spots of each slide.
    batch_size
        Largest number of spots in a batch.
    mixed
        Whether a batch may hold spots of several slides.
    seed
        Seed; together with the epoch it decides the order.
    rank, world
        Which device this is, of how many.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        mixed: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes = [int(s) for s in sizes]
        self.batch_size = batch_size
        self.mixed = mixed
        self.seed = seed
        self.rank = rank
        self.world = world
        self._offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        if self._total() // world == 0:
            msg = (
                f"{sum(self.sizes)} spots give {self._total()} batch(es) of {batch_size} for {world} devices; "
                "use fewer devices or a smaller batch_size."
            )
            raise InputError(msg)

    def __len__(self) -> int:
        """Batches an epoch on this device."""
        return self._total() // self.world

    def _total(self) -> int:
        groups = [sum(self.sizes)] if self.mixed else self.sizes
        return sum(-(-n // self.batch_size) for n in groups)

    def batches(self, epoch: int) -> list[list[Pick]]:
        """Return the batches of an epoch on this device."""
        rng = np.random.default_rng([self.seed, epoch])
        groups = [np.arange(self._offsets[-1])] if self.mixed else self._per_slide()
        cut: list[NDArray[np.int64]] = []
        for spots in groups:
            if len(spots) == 0:
                continue
            cut += np.array_split(rng.permutation(spots), -(-len(spots) // self.batch_size))
        if not self.mixed:
            cut = [cut[i] for i in rng.permutation(len(cut))]
        mine = cut[self.rank :: self.world][: len(self)]
        return [self._by_slide(spots) for spots in mine]

    def _per_slide(self) -> list[NDArray[np.int64]]:
        return [np.arange(a, b) for a, b in zip(self._offsets[:-1], self._offsets[1:], strict=True)]

    def _by_slide(self, spots: NDArray[np.int64]) -> list[Pick]:
        spots = np.sort(spots)
        slide = np.searchsorted(self._offsets, spots, side="right") - 1
        found, starts = np.unique(slide, return_index=True)
        parts = np.split(spots, starts[1:])
        return [Pick(int(s), part - self._offsets[s]) for s, part in zip(found, parts, strict=True)]
