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

    Every spot is used once an epoch (several devices drop the few batches that do not divide evenly); or, balanced, all
    slides have an equal share of it, so that one with many spots does not crowd out the others. Batches are cut
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
    balanced
        Whether an epoch holds as many spots of each slide as slides have on average: all of those of a small slide
        several times, some of those of a large one. A spot is in a batch once.
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
        balanced: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes = [int(s) for s in sizes]
        self.batch_size = batch_size
        self.mixed = mixed
        self.drawn = self._equal_shares() if balanced else self.sizes
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
        groups = [sum(self.drawn)] if self.mixed else self.drawn
        return sum(-(-n // self.batch_size) for n in groups)

    def batches(self, epoch: int) -> list[list[Pick]]:
        """Return the batches of an epoch on this device."""
        rng = np.random.default_rng([self.seed, epoch])
        cut: list[NDArray[np.int64]] = []
        for spots in self._groups(rng):
            if len(spots):
                cut += np.array_split(spots, -(-len(spots) // self.batch_size))
        if not self.mixed:
            cut = [cut[i] for i in rng.permutation(len(cut))]
        mine = cut[self.rank :: self.world][: len(self)]
        return [self._by_slide(spots) for spots in mine]

    def _equal_shares(self) -> list[int]:
        there = [n > 0 for n in self.sizes]
        return [round(sum(self.sizes) / max(1, sum(there))) * kept for kept in there]

    def _groups(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return the spots of an epoch in random order: of all slides together, or slide by slide."""
        if self.mixed and self.drawn == self.sizes:
            return [rng.permutation(np.arange(self._offsets[-1]))]
        groups = []
        for start, size, drawn in zip(self._offsets[:-1], self.sizes, self.drawn, strict=True):
            # one round over the slide after the other, so that a batch seldom meets a spot twice
            rounds = [start + rng.permutation(size) for _ in range(-(-drawn // max(1, size)))]
            groups.append(np.concatenate(rounds)[:drawn] if rounds else np.empty(0, np.int64))
        return [rng.permutation(np.concatenate(groups))] if self.mixed else groups

    def _by_slide(self, spots: NDArray[np.int64]) -> list[Pick]:
        spots = np.unique(spots)
        slide = np.searchsorted(self._offsets, spots, side="right") - 1
        found, starts = np.unique(slide, return_index=True)
        parts = np.split(spots, starts[1:])
        return [Pick(int(s), part - self._offsets[s]) for s, part in zip(found, parts, strict=True)]
