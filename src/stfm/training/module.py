"""The model and its optimiser as Lightning sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from stfm._errors import InputError, StfmError
from stfm.training.schedules import cosine, warmup_cosine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.models.base import Model
    from stfm.nn.batch import Batch
    from stfm.training.recipes import Recipe

__all__ = ["Meter", "TrainingModule", "parameter_groups"]

#: entry of a checkpoint that says which run it belongs to
RUN = "stfm_run"
_NAMED_SPOTS = 5


class Meter:
    """Mean of each named loss over the spots of an epoch, summed on the device and read once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.n_spots = 0

    def add(self, losses: dict[str, Tensor], n_spots: int) -> None:
        """Add the mean losses of a batch."""
        for name, value in losses.items():
            part = value.detach().double() * n_spots if value.device.type != "mps" else value.detach() * n_spots
            self.sums[name] = self.sums[name] + part if name in self.sums else part
        self.n_spots += n_spots

    def read(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the means over all devices and start anew."""
        names = list(self.sums)
        if not names:
            return {}
        total = torch.stack([*self.sums.values(), torch.as_tensor(self.n_spots).to(self.sums[names[0]])])
        total = trainer.strategy.reduce(total, reduce_op="sum")
        self.sums, self.n_spots = {}, 0
        return dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))


class TrainingModule(pl.LightningModule):
    """Wraps a model for training.

    Parameters
    ----------
    model
        Any :class:`~stfm.models.base.Model`.
    recipe
        How to train.
    total_steps
        Steps of the optimiser in the whole run.
    slide_names
        Names by ``slide_id``, for messages.
    run
        What the run is, as plain values; written into its checkpoints.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        *,
        total_steps: int,
        slide_names: Sequence[str],
        run: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.total_steps = total_steps
        self.slide_names = list(slide_names)
        self.run = run or {}
        self.meters = {"train": Meter(), "val": Meter()}

    def train(self, mode: bool = True) -> TrainingModule:  # noqa: FBT001, FBT002  (torch's own signature)
        """Switch to training or evaluation; frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode:
            for part in self.model.modules():
                weights = list(part.parameters())
                if weights and not any(w.requires_grad for w in weights):
                    part.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; a loss that is no number ends the run and names the batch."""
        losses = self.model.losses(batch)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise StfmError(self._diverged(losses, batch, batch_idx))
        self.meters["train"].add(losses, len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the losses of a validation batch."""
        self.meters["val"].add(self.model.losses(batch), len(batch))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch to the device."""
        return batch.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint which run it belongs to."""
        checkpoint[RUN] = self.run

    def rates(self, step: int) -> tuple[float, float]:
        """Return learning rate and weight decay of a step, both read at its middle, so that no step has rate 0."""
        recipe, total = self.recipe, self.total_steps
        warmup = recipe.warmup_steps(total)
        at = min(step, total) + 0.5
        lr = warmup_cosine(at, total, peak=recipe.lr, warmup=warmup, final=recipe.lr * recipe.min_lr_ratio)
        return lr, cosine(at, total, start=recipe.weight_decay, end=recipe.weight_decay_end)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set learning rate and weight decay of the step (functions of its number: nothing to restore)."""
        lr, weight_decay = self.rates(self.trainer.global_step)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW or Adam over what is trained."""
        recipe = self.recipe
        lr, weight_decay = self.rates(0)
        groups = parameter_groups(self.model, decay_all=recipe.decay_all, layer_decay=recipe.layer_decay)
        for group in groups:
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        fused = self.device.type in ("cpu", "cuda")
        return kind(groups, lr=lr, betas=recipe.betas, eps=recipe.eps, fused=fused)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient (Lightning's own way refuses fused optimisers)."""
        if self.recipe.clip_grad_norm is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.recipe.clip_grad_norm)

    def _diverged(self, losses: dict[str, Tensor], batch: Batch, batch_idx: int) -> str:
        bad = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
        slides, spots = "?", "?"
        if batch.slide_id is not None:
            ids = batch.slide_id.unique().tolist()
            slides = ", ".join(repr(self.slide_names[i]) for i in ids)
        if batch.index is not None:
            shown = batch.index[:_NAMED_SPOTS].tolist()
            spots = ", ".join(map(str, shown)) + (" …" if len(batch) > len(shown) else "")
        inputs = [n for n, t in batch.tensors().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        cause = (
            f"{', '.join(inputs)} of the batch hold nan"
            if inputs
            else "lower lr or clip_grad_norm, or use precision='fp32'"
        )
        return (
            f"The loss is {losses['loss'].item()} ({', '.join(bad)}) in epoch {self.current_epoch}, batch {batch_idx}, "
            f"with spots of slide {slides} at positions {spots}: {cause}. Checkpoints written before it stand."
        )


def parameter_groups(model: Model, *, decay_all: bool = False, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return what is trained in groups: decayed (matrices), and not (biases, norms, temperatures).

    Parameters
    ----------
    model
        The model; frozen parameters are left out.
    decay_all
        Decay everything.
    layer_decay
        Factor of the learning rate from one layer of ``model.layers()`` to the one before it; what is in none of them
        (heads and decoders) has the whole rate.

    Returns
    -------
    Groups for an optimiser, each with a flag ``"decays"`` and ``"lr_scale"``.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        msg = "All parameters of the model are frozen; there is nothing to train."
        raise InputError(msg)
    layers = model.layers() if layer_decay < 1 else []
    scale = {
        id(p): layer_decay ** (len(layers) - i)
        for i, parts in enumerate(layers) for part in parts for p in part.parameters()
    }  # fmt: skip
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in trained:
        groups.setdefault((decay_all or p.ndim >= 2, scale.get(id(p), 1.0)), []).append(p)
    return [{"params": ps, "decays": flag, "lr_scale": factor} for (flag, factor), ps in groups.items()]
