"""What happens around the steps of a run: seeds, history, best weights, early stop, checkpoints, progress."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch

from stfm._logging import get_logger
from stfm._progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from stfm.nn.batch import Batch
    from stfm.training.module import TrainingModule

__all__ = ["Bar", "Checkpoints", "Journal", "Seeds"]

logger = get_logger("training")

#: file of the newest checkpoint within ``checkpoint_dir``
LAST = "last.ckpt"
#: what decides which weights are best
MONITOR = "val_loss"


class Seeds(pl.Callback):
    """Sets torch's random numbers at the start of each epoch, so that a resumed run draws those of an unbroken one.

    Parameters
    ----------
    seed
        Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Seed at the first batch (Lightning may leave the epoch's own hook out after a restart)."""
        if batch_idx == 0:
            mixed = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
            torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0] >> 1))


class Journal(pl.Callback):
    """Keeps a row an epoch, the weights of the best validation loss, and stops a run that no longer improves.

    Parameters
    ----------
    module
        What is trained.
    patience
        Epochs without a better validation loss after which the run stops; None never stops.
    keep_best
        Whether to remember the best weights.
    """

    def __init__(self, module: TrainingModule, *, patience: int | None, keep_best: bool) -> None:
        self.module = module
        self.patience = patience
        self.keep_best = keep_best
        self.rows: list[dict[str, float]] = []
        self.best_loss = math.inf
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.stale = 0
        self._start = 0.0
        self._n_spots = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once when a finished run is resumed."""
        self._stop_if_stale(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock of an epoch."""
        if batch_idx == 0:
            self._start, self._n_spots = time.perf_counter(), 0
        self._n_spots += len(batch) * trainer.world_size

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of the epoch; validation ran before this hook."""
        seconds = time.perf_counter() - self._start
        lr, weight_decay = self.module.rates(trainer.global_step - 1)
        row: dict[str, float] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": lr,
            "weight_decay": weight_decay,
            "seconds": seconds,
            "spots_per_second": self._n_spots / seconds,
        }
        for phase, meter in self.module.meters.items():
            row |= {f"{phase}_{name}": value for name, value in meter.read(trainer).items()}
        self.rows.append(row)
        logger.info("epoch %d: %s", row["epoch"], ", ".join(f"{k} {v:.4g}" for k, v in row.items() if "loss" in k))
        if MONITOR in row:
            self._compare(row[MONITOR])
            self._stop_if_stale(trainer)

    def _compare(self, loss: float) -> None:
        if not loss < self.best_loss:
            self.stale += 1
            return
        self.best_loss, self.stale = loss, 0
        if self.keep_best:
            frozen = {name for name, p in self.module.model.named_parameters() if not p.requires_grad}
            state = self.module.model.state_dict()
            self.best_weights = {k: v.detach().to("cpu", copy=True) for k, v in state.items() if k not in frozen}

    def _stop_if_stale(self, trainer: pl.Trainer) -> None:
        if self.patience is not None and self.stale >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        names = ("rows", "best_loss", "best_weights", "stale")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        for name, value in state_dict.items():
            setattr(self, name, value)


class Checkpoints(pl.Callback):
    """Writes ``last.ckpt`` at the end of an epoch; the old one stays whole until the new one is.

    Parameters
    ----------
    folder
        Where to; made if it is not there.
    every
        Epochs between two checkpoints; the last epoch has one always.
    """

    def __init__(self, folder: Path, *, every: int = 1) -> None:
        self.folder = folder
        self.every = every

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoint."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every and epoch != trainer.max_epochs and not trainer.should_stop:
            return
        new = self.folder / f"{LAST}.new"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            new.replace(self.folder / LAST)
        trainer.strategy.barrier("stfm-checkpoint")


class Bar(pl.Callback):
    """A progress bar over all steps, for people who watch."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._advance: Callable[[int], None] = lambda _steps: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero and trainer.max_epochs is not None:
            total = int(trainer.num_training_batches) * trainer.max_epochs
            self._advance = self._open.enter_context(progress("Training", total))
            self._advance(trainer.current_epoch * int(trainer.num_training_batches))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Move it by a batch."""
        self._advance(1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._open.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._open.close()
