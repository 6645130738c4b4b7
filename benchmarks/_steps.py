"""What a step of training costs beside the bare forward and backward pass of the same network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from stfm.inference.device import autocast
from stfm.inference.features import use_frozen_features
from stfm.models.base import Model
from stfm.models.inputs import SlideInputs
from stfm.models.registry import create
from stfm.nn.batch import Batch
from stfm.slide.slide import Slide
from stfm.training.data import Batches
from stfm.training.engine import fit
from stfm.training.genes import make_vocabulary
from stfm.training.module import TrainingModule
from stfm.training.recipes import Recipe, resolve_recipe
from stfm.training.sampling import SpotSampler
from stfm.training.tilecache import keep_tiles

#: epochs whose time is measured
EPOCHS = 3
#: steps of which the optimiser's time is taken
_OPTIMISED = 10


def wait(device: str) -> None:
    """Wait until a device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str = "cpu") -> np.ndarray:
    """Seconds on the wall and seconds of CPU in this thread, once the device has done its work."""
    wait(device)
    return np.array([time.perf_counter(), time.thread_time()])


def clock(function: Callable[[], object], device: str = "cpu") -> np.ndarray:
    """Wall seconds of a call, and seconds of CPU in the thread that computes."""
    start = now(device)
    function()
    return now(device) - start


def shares(what: str, bare: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Milliseconds and the share of the bare model, by the clock on the wall and by CPU time."""
    return {
        "bare_ms": 1e3 * float(bare[0]),
        f"{what}_ms": 1e3 * float(whole[0]),
        "share": float(bare[0] / whole[0]),
        "share_of_cpu": float(bare[1] / whole[1]),
    }


class Steps:
    """Bare passes on batches that lie ready, and whole runs of ``fit``, of one model in one stage.

    Parameters
    ----------
    name
        Of the model.
    slides
        What it is trained on.
    stage
        Of the model; None for one that has none.
    device
        ``"cpu"`` or ``"cuda"``; the latter computes in bf16.
    config
        Fields of the model's configuration to change.
    changes
        Fields of the recipe to change.
    """

    def __init__(
        self,
        name: str,
        slides: Sequence[Slide],
        *,
        stage: str | None = None,
        device: str = "cpu",
        config: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        self.name, self.slides, self.stage, self.device = name, list(slides), stage, device
        self.config = config or {}
        self.precision = "bf16" if device == "cuda" else "fp32"
        self.recipe: Recipe = resolve_recipe(None, name, epochs=EPOCHS + 1, precision=self.precision, **changes)
        self.vocabulary = make_vocabulary(slides)
        self.model = self._new()
        inputs = [SlideInputs(s, self.model.inputs, self.vocabulary, slide_id=i) for i, s in enumerate(slides)]
        use_frozen_features(self.model, inputs, device=device, cache=True)
        self.model.fit_inputs(inputs)
        self.model.ready(inputs)
        keep_tiles(inputs, self.recipe.cache_gb)
        sampler = SpotSampler([s.n_obs for s in slides], self.recipe.batch_size)
        self.reader = Batches(inputs, sampler, epoch=lambda: 0, recipe=self.recipe)
        self.batches: list[Batch] = [batch.to(device) for batch in self.reader.epoch(0)]
        self.model.to(device)
        self.module = TrainingModule(self.model, self.recipe, total_steps=1000, slide_names=[s.name for s in slides])
        self.module.train()

    def _new(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create(self.name, self.vocabulary, pretrained=False, **self.config)
        if self.stage is not None:
            model.stage = self.stage
        return model

    def _cast(self) -> AbstractContextManager[Any]:
        return autocast(torch.device(self.device), self.precision)

    def backward(self, batch: Batch) -> None:
        """Forward and backward pass of a batch."""
        with self._cast():
            loss = self.model.losses(batch)["loss"]
        loss.backward()

    @property
    def stride(self) -> int:
        """Steps that are timed together: one, or all of an epoch on a device, which must not wait after each."""
        return 1 if self.device == "cpu" else len(self.batches)

    def bare(self) -> np.ndarray:
        """Seconds (wall, CPU) of forward and backward of the batches, nothing else, ``(batches / stride, 2)``."""

        def passes(batches: list[Batch]) -> None:
            for batch in batches:
                self.backward(batch)
                self.model.zero_grad()

        starts = range(0, len(self.batches), self.stride)
        return np.array([clock(lambda a=a: passes(self.batches[a : a + self.stride]), self.device) for a in starts])

    def optimiser(self) -> float:
        """Seconds of clipping, of the optimiser's step and of letting the gradients go; the least of some steps."""
        optimiser = self.module.configure_optimizers()

        def step() -> None:
            self.module.configure_gradient_clipping(optimiser)
            optimiser.step()
            optimiser.zero_grad()

        seconds = []
        for batch in self.batches[:_OPTIMISED]:
            self.backward(batch)
            seconds.append(clock(step, self.device)[0])
        return float(min(seconds))

    def reading(self) -> float:
        """Seconds a batch takes to be read and augmented, with nothing else going on."""
        return float(clock(lambda: sum(1 for _ in self.reader.epoch(1)))[0] / len(self.batches))

    def epochs(self) -> np.ndarray:
        """Seconds (wall, CPU) from a step of ``fit`` to the next, ``(epochs, batches / stride, 2)``."""
        model, stamps, calls = self._new(), [], 0
        plain = model.losses

        def losses(batch: Batch) -> dict[str, torch.Tensor]:
            nonlocal calls
            if calls % self.stride == 0:
                stamps.append(now(self.device))
            calls += 1
            return plain(batch)

        model.losses = losses  # type: ignore[method-assign]
        fit(
            model, self.slides, self.recipe, accelerator=self.device,
            prepare=lambda one, made: use_frozen_features(one, made, device=self.device, cache=True),
        )  # fmt: skip
        n = len(self.batches) // self.stride  # the last epoch is there to end the one before it
        return np.diff(np.array(stamps)[: EPOCHS * n + 1], axis=0).reshape(EPOCHS, n, 2)


def step_share(steps: Steps, runs: int) -> dict[str, Any]:
    """Bare forward + backward beside a step of ``fit``, in turns, as often; the fastest time of each batch counts."""
    n = len(steps.batches)
    steps.bare()
    bare, whole = [], []
    for _ in range(runs):
        bare.append(steps.bare())
        whole += [*steps.epochs()]
        bare += [steps.bare() for _ in range(EPOCHS - 1)]
    found = shares("step", np.min(bare, 0).sum(axis=0) / n, np.min(whole, 0).sum(axis=0) / n)
    optimiser, reading = steps.optimiser(), steps.reading()
    return {
        "batch_size": steps.recipe.batch_size,
        "batches": n,
        **found,
        "optimiser_ms": 1e3 * optimiser,
        "reading_ms": 1e3 * reading,
        "share_with_optimiser": (found["bare_ms"] + 1e3 * optimiser) / found["step_ms"],
    }
