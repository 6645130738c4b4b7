"""``fit``: slides in, trained model out."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pandas as pd
import torch

from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning
from stfm._validate import check_choice, check_count
from stfm._version import __version__
from stfm.inference.device import evaluating, resolve_device
from stfm.models.inputs import SlideInputs
from stfm.training.callbacks import LAST, Bar, Checkpoints, Journal, Seeds
from stfm.training.data import SlideData, check_alike
from stfm.training.module import RUN, TrainingModule
from stfm.training.tilecache import keep_tiles
from stfm.training.tune import tuned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stfm.models.base import Model
    from stfm.slide.slide import Slide
    from stfm.training.recipes import Recipe

__all__ = ["fit", "fit_stages", "resolve_accelerator", "resolve_precision"]

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def fit(
    model: Model,
    train: Sequence[Slide],
    recipe: Recipe,
    *,
    validation: Sequence[Slide] = (),
    prepare: Callable[[Model, Sequence[SlideInputs]], None] | None = None,
    fit_inputs: bool = True,
    adapt: bool = False,
    calibrate: bool = True,
    resume: str | Path | bool | None = None,
    checkpoint_dir: str | Path | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
) -> Model:
    """Train a model in place.

    Parameters
    ----------
    model
        The model, with its vocabulary.
    train
        Training slides.
    recipe
        How to train.
    validation
        Slides whose loss is measured after each epoch.
    prepare
        Called with the model and all slides made ready before the first step, for example to keep the features of
        frozen encoders.
    fit_inputs
        Whether the model may estimate what it needs from the training slides (``Model.fit_inputs``); off when it
        continues from trained weights.
    adapt
        Whether a model that was trained before takes what it can from the new slides (``Model.adapt_inputs``).
    calibrate
        Whether the size of the model's errors is measured at the end (``Model.calibrate``); off where another stage
        follows, which would measure it again.
    resume
        Checkpoint to go on from; True takes the newest of ``checkpoint_dir`` if there is one.
    checkpoint_dir
        Where to write checkpoints; None writes none.
    seed
        Seed of order, augmentation and dropout.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"`` (or ``"cuda"``) or ``"mps"``.
    devices
        Number of devices; with more than one, batch norm is synchronized (on CUDA) and negatives come from all.

    Returns
    -------
    The model in evaluation mode, with ``history`` and ``seen``.

    Raises
    ------
    InputError
        Slides that cannot be trained on together, or a checkpoint of another run.
    StfmError
        The loss became nan; the message names the batch.
    """
    accelerator = resolve_accelerator(accelerator, devices)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    # Slides are numbered through, so that no two share a slide_id.
    slides = [*train, *validation]
    inputs = [SlideInputs(slide, model.inputs, model.vocabulary, slide_id=i) for i, slide in enumerate(slides)]
    check_alike(inputs, mixed=recipe.batches == "mixed")
    run = _run_record(model, train, validation, recipe, seed)
    start = _checkpoint(folder, run, resume=resume)
    if prepare is not None:
        prepare(model, inputs)
    if fit_inputs:
        model.fit_inputs(inputs[: len(train)])
    elif adapt:
        model.adapt_inputs(inputs[: len(train)])
    model.ready(inputs)
    keep_tiles(inputs, recipe.cache_gb)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    data = SlideData(inputs[: len(train)], inputs[len(train) :], recipe, seed=seed)
    steps = data.steps_per_epoch(devices)
    recipe = recipe.replace(epochs=recipe.planned_epochs(steps))
    total = steps * recipe.epochs
    module = TrainingModule(model, recipe, total_steps=total, slide_names=[s.name for s in slides], run=run)
    journal = Journal(module, patience=recipe.patience, keep_best=recipe.keep == "best" and bool(validation))
    callbacks: list[pl.Callback] = [Seeds(seed), journal, Bar()]
    if folder is not None:
        callbacks.append(Checkpoints(folder, every=recipe.checkpoint_every))
    with _quiet(), _own_random_numbers(), _interruptible():
        trainer = _trainer(recipe, callbacks, accelerator=accelerator, devices=devices, validates=bool(validation))
        module.train()
        trainer.fit(module, datamodule=data, ckpt_path=None if start is None else str(start))
    _take_best(model, journal)
    if calibrate:
        _calibrate(model, inputs[: len(train)], inputs[len(train) :], accelerator)
    model.ready([])
    return _finished(model, train, validation, recipe, journal)


def fit_stages(
    model: Model,
    train: Sequence[Slide],
    recipe: Recipe,
    stages: Sequence[str | None],
    *,
    checkpoint_dir: str | Path | None = None,
    **how: Any,
) -> Model:
    """Train a model in place through stages, each with checkpoints in a folder of its own.

    Parameters
    ----------
    model, train, recipe
        As of :func:`fit`; the model takes what it needs from the training slides once, unless it was trained before.
    stages
        Stages in turn; ``(None,)`` for a model that has none.
    checkpoint_dir
        Where to write checkpoints. A run that is resumed goes quickly through the stages that were finished.
    how
        Other arguments of :func:`fit`.

    Returns
    -------
    The model, as :func:`fit` returns it.
    """
    _check_paired(model, [*train, *how.get("validation", ())], stages)
    if recipe.flips and not model.flippable:
        msg = "tiles are neither turned nor mirrored, since the model reads the places of spots in them (flips=False)."
        warnings.warn(msg, StfmWarning, stacklevel=3)
        recipe = recipe.replace(flips=False)
    with tuned(model, recipe, seed=how.get("seed", 0)) as restrict:
        adapt = model.history is not None
        for stage in stages:
            folder = None if checkpoint_dir is None else Path(checkpoint_dir)
            if stage is not None:
                model.stage = stage
                folder = None if folder is None else folder / stage
            restrict()
            first = model.history is None
            shown, seen = _those_of_stage(model, train, stage), _those_of_stage(model, how.get("validation", ()), stage)
            part = {**how, "validation": seen}
            last = stage == stages[-1]
            fit(model, shown, recipe, fit_inputs=first, adapt=adapt, calibrate=last, checkpoint_dir=folder, **part)
            adapt = False
    return model


def _those_of_stage(model: Model, slides: Sequence[Slide], stage: str | None) -> list[Slide]:
    """Return the slides that a stage can learn from: those with H&E and counts, where it needs both."""
    if stage not in model.paired_stages:
        return list(slides)
    return [slide for slide in slides if slide.tiles is not None and slide.counts is not None]


def _check_paired(model: Model, slides: Sequence[Slide], stages: Sequence[str | None]) -> None:
    """Refuse a stage that needs both modalities, before any other is trained, where all slides lack one of them."""
    paired = [stage for stage in stages if stage in model.paired_stages]
    if not paired:
        return
    spec, config = model.inputs, model.config
    reads_gene = spec.gene and getattr(config, "reads_gene", True)  # an ablation may write counts without reading them
    there = {"H&E": [s.tiles is not None for s in slides], "counts": [s.counts is not None for s in slides]}
    lacking = [what for what, have in there.items() if not any(have)]
    unread = [what for what, reads in (("H&E", spec.image), ("counts", reads_gene)) if not reads]
    if not (lacking or unread):
        return
    free = [stage for stage in model.stages if stage not in model.paired_stages]
    who = f"slide {slides[0].name!r} has no {lacking[0]}" if lacking else f"the model reads no {unread[0]}"
    if free:
        advice = f"alignment needs both modalities; stage={free[0]!r} can run."
    else:
        advice = f"every stage of {model.family!r} needs both modalities; 'storm' learns from one with stage='mask'."
    msg = f"{who}, and {advice}"
    raise InputError(msg)


def _take_best(model: Model, journal: Journal) -> None:
    """Take the best weights where they were kept."""
    if journal.best_weights is not None:
        model.load_state_dict(journal.best_weights, strict=False)


def _calibrate(model: Model, train: Sequence[SlideInputs], validation: Sequence[SlideInputs], device: str) -> None:
    """Measure the size of the errors on slides that the weights were not learned from, if there are any."""
    with evaluating(model, resolve_device(device)):
        model.calibrate(validation or train, held_out=bool(validation))


def _finished(
    model: Model, train: Sequence[Slide], validation: Sequence[Slide], recipe: Recipe, journal: Journal
) -> Model:
    """Give the model the record of its training."""
    model.to("cpu")
    before = model.history
    rows = pd.DataFrame(journal.rows)
    if model.stage is not None:
        rows.insert(0, "stage", model.stage)
    model.history = rows if before is None or before.empty else pd.concat([before, rows], ignore_index=True)
    # Validation slides chose the weights, so they too are no test of them.
    model.seen.add([*train, *validation])
    model.seen.recipe, model.seen.further = recipe.to_dict(), {}
    return model.eval()


def _trainer(
    recipe: Recipe, callbacks: list[pl.Callback], *, accelerator: str, devices: int, validates: bool
) -> pl.Trainer:
    precision = resolve_precision(recipe.precision, accelerator)
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="auto" if devices == 1 else "ddp",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        # torch synchronizes batch norm on CUDA devices only
        sync_batchnorm=devices > 1 and accelerator == "cuda",
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        callbacks=callbacks,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def resolve_accelerator(accelerator: str = "auto", devices: int = 1) -> str:
    """Return ``"cpu"``, ``"cuda"`` or ``"mps"``, after checking that so many devices are there.

    Parameters
    ----------
    accelerator
        ``"auto"`` (the device of the settings, else the best there is), ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``.
    devices
        Number of devices.

    Returns
    -------
    The kind of device.

    Raises
    ------
    InputError
        The device is not there, or not so often.
    """
    check_choice("accelerator", accelerator, _ACCELERATORS)
    check_count("devices", devices)
    if accelerator == "gpu":
        accelerator = "mps" if torch.backends.mps.is_available() else "cuda"
    kind = resolve_device(accelerator).type
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, devices)
    if devices > there:
        msg = f"devices={devices} asks for more than the {there} {kind} device(s) of this machine."
        raise InputError(msg)
    if devices > 1 and "ipykernel" in sys.modules:
        msg = f"devices={devices} needs a script (each device runs it); in a notebook train on one device."
        raise InputError(msg)
    return kind


def resolve_precision(precision: str, kind: str) -> str:
    """Return ``"bf16"`` or ``"fp32"``: what was asked for, or for ``"auto"`` bf16 on CUDA devices that have it."""
    if precision != "auto":
        return precision
    return "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _run_record(
    model: Model, train: Sequence[Slide], validation: Sequence[Slide], recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Say what a run is, as plain values: a checkpoint continues this run and no other."""
    genes = "" if model.vocabulary is None else "\n".join(map(str, model.vocabulary.names))
    return {
        "stfm_version": __version__,
        "family": model.family,
        "config": json.loads(json.dumps(asdict(model.config), default=str)),
        "genes": hashlib.sha256(genes.encode()).hexdigest(),
        "recipe": recipe.to_dict(),
        "seed": seed,
        "stage": model.stage,
        "train": [[s.name, s.n_obs] for s in train],
        "validation": [[s.name, s.n_obs] for s in validation],
    }


def _checkpoint(folder: Path | None, run: dict[str, Any], *, resume: str | Path | bool | None) -> Path | None:
    """Return the checkpoint to go on from, after checking that it belongs to this run."""
    if resume is None or resume is False:
        return None
    if resume is True:
        if folder is None:
            msg = "resume=True goes on from the newest checkpoint of checkpoint_dir=, which is not given."
            raise InputError(msg)
        path = folder / LAST
        if not path.exists():
            return None
    else:
        path = Path(resume)
        path = path / LAST if path.is_dir() else path
        if not path.exists():
            msg = f"There is no checkpoint at {path}; resume=True starts anew where there is none."
            raise MissingKeyError(msg)
    before = _read_run(path)
    for name in run:
        if name != "stfm_version" and before.get(name) != run[name]:
            msg = f"{path} belongs to another run: {_difference(name, before.get(name), run[name])}."
            raise InputError(msg)
    return path


def _read_run(path: Path) -> dict[str, Any]:
    import pickle
    import zipfile

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        msg = f"{path} is no whole checkpoint ({str(error).splitlines()[0]}); start anew without resume=."
        raise DataIntegrityError(msg) from error
    run = content.get(RUN) if isinstance(content, dict) else None
    if not isinstance(run, dict):
        msg = f"{path} is no checkpoint of stfm; give one that checkpoint_dir= wrote."
        raise DataIntegrityError(msg)
    return run


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return f"{name}: {key} was {before.get(key)!r}, is {now.get(key)!r}"
    if name == "genes":
        return "the model's genes differ"
    return f"{name} was {before!r}, is {now!r}"


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave torch's random numbers as the user had them."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl+C arrive as KeyboardInterrupt: Lightning turns it into an exit and switches it off for good."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's adverts and hints off the user's screen; its errors pass."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
