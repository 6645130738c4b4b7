"""From slides to the batches of an epoch: sampled, read ahead in a thread, changed at random."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np

from stfm._errors import InputError
from stfm.inference.readahead import read_ahead
from stfm.models.inputs import collate
from stfm.training.augment import augment, thin_counts
from stfm.training.sampling import SpotSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stfm.models.inputs import SlideInputs
    from stfm.nn.batch import Batch
    from stfm.training.recipes import Recipe
    from stfm.training.sampling import Pick

__all__ = ["Batches", "SlideData", "check_alike"]

_AHEAD = 2
#: keeps the random numbers of order, augmentation and thinning apart
_AUGMENT, _THIN = 1, 2
#: what slides keep of their counts and would not hold for fewer counts
_KEPT_COUNTS = ("_on_vocabulary", "_mean_expression", "_mean_niche_expression")


class Batches:
    """The batches of one epoch after another; what Lightning takes for a data loader.

    A batch depends on the seed, the epoch and its number alone, never on what ran before.

    Parameters
    ----------
    inputs
        Slides made ready for the model.
    sampler
        Which spots make up a batch.
    epoch
        Returns the number of the current epoch.
    recipe
        Augmentation; None changes nothing.
    pin
        Whether to pin memory, for faster copies to a CUDA device.
    """

    def __init__(
        self,
        inputs: Sequence[SlideInputs],
        sampler: SpotSampler,
        *,
        epoch: Callable[[], int],
        recipe: Recipe | None = None,
        pin: bool = False,
    ) -> None:
        self.inputs = list(inputs)
        self.spots = sampler
        self.recipe = recipe
        self.pin = pin
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.spots)

    def __iter__(self) -> Iterator[Batch]:
        # A generator starts at the first batch, when Lightning has restored the number of the epoch.
        yield from read_ahead(self.epoch(self._epoch()), depth=_AHEAD)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        inputs = self._thinned(epoch)
        for number, picks in enumerate(self.spots.batches(epoch)):
            batch = self._batch(inputs, picks)
            if self.recipe is not None:
                rng = np.random.default_rng([self.spots.seed, epoch, number, self.spots.rank, _AUGMENT])
                batch = augment(batch, self.recipe, rng)
            if self.pin:
                batch = replace(batch, **{name: t.pin_memory() for name, t in batch.tensors().items()})
            yield batch

    def _batch(self, inputs: Sequence[SlideInputs], picks: list[Pick]) -> Batch:
        return collate([inputs[pick.slide].batch(pick.indices) for pick in picks])

    def _thinned(self, epoch: int) -> list[SlideInputs]:
        share = 0.0 if self.recipe is None else self.recipe.count_thinning
        if share == 0:
            return self.inputs
        return [_thin(one, share, np.random.default_rng([self.spots.seed, epoch, i, _THIN]))
                for i, one in enumerate(self.inputs)]  # fmt: skip


def _thin(inputs: SlideInputs, share: float, rng: np.random.Generator) -> SlideInputs:
    """Return the inputs with fewer counts; niches and frozen features stay."""
    niches = inputs.niches  # found once, shared by all copies
    thinned = copy(inputs)
    thinned.slide = replace(thin_counts(inputs.slide, share, rng), niches=niches)
    for name in _KEPT_COUNTS:
        vars(thinned).pop(name, None)
    return thinned


class SlideData(pl.LightningDataModule):
    """Training and validation batches of a run.

    Parameters
    ----------
    train
        Training slides, made ready.
    validation
        Validation slides, made ready; may be empty.
    recipe
        How to train.
    seed
        Seed of order and augmentation.
    """

    def __init__(
        self, train: Sequence[SlideInputs], validation: Sequence[SlideInputs], recipe: Recipe, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.train = list(train)
        self.validation = list(validation)
        self.recipe = recipe
        self.seed = seed

    def _sampler(self, inputs: Sequence[SlideInputs], rank: int, world: int) -> SpotSampler:
        balanced = self.recipe.balance == "slides" and inputs is self.train
        how = {"mixed": self.recipe.batches == "mixed", "balanced": balanced}
        sizes = [one.n_obs for one in inputs]
        return SpotSampler(sizes, self.recipe.batch_size, **how, seed=self.seed, rank=rank, world=world)

    def steps_per_epoch(self, world: int = 1) -> int:
        """Return the steps of the optimiser in an epoch."""
        return -(-len(self._sampler(self.train, 0, world)) // self.recipe.accumulate)

    def _loader(self, inputs: Sequence[SlideInputs], recipe: Recipe | None, epoch: Callable[[], int]) -> Batches:
        trainer = self.trainer
        if trainer is None:
            msg = "SlideData gives batches to a Lightning trainer; use stfm.training.engine.fit."
            raise InputError(msg)
        sampler = self._sampler(inputs, trainer.global_rank, trainer.world_size)
        pin = trainer.strategy.root_device.type == "cuda"
        return Batches(inputs, sampler, epoch=epoch, recipe=recipe, pin=pin)

    def train_dataloader(self) -> Batches:
        """Return the training batches: another order and other augmentation each epoch."""
        trainer = self.trainer
        return self._loader(self.train, self.recipe, lambda: trainer.current_epoch if trainer is not None else 0)

    def val_dataloader(self) -> Batches | list[Batches]:
        """Return the validation batches: the same in every epoch, so that their losses compare."""
        return self._loader(self.validation, None, lambda: 0) if self.validation else []


def check_alike(inputs: Sequence[SlideInputs], *, mixed: bool = True) -> None:
    """Refuse slides that cannot be trained on together.

    Parameters
    ----------
    inputs
        All slides.
    mixed
        Whether a batch holds spots of several slides, and so only what all of them have.
    """
    first = inputs[0]
    for one in inputs:
        for have, want, what in ((one.has_image, first.has_image, "H&E"), (one.has_gene, first.has_gene, "counts")):
            if mixed and have != want:
                lacks, has = (one, first) if want else (first, one)
                msg = (
                    f"slide {lacks.slide.name!r} has no {what}, slide {has.slide.name!r} has: train on slides with the "
                    "same modalities, or with batches of one slide each (a recipe with batches='slide')."
                )
                raise InputError(msg)
        if one.spec.window is not None and (one.slide.mpp is None) != (first.slide.mpp is None):
            lacks = one if one.slide.mpp is None else first
            msg = (
                f"slide {lacks.slide.name!r} has coordinates in px and no µm/px, others have µm; distances in windows "
                "are compared in µm: give mpp= for it."
            )
            raise InputError(msg)
