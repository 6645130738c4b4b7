"""``tl.train``."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stfm._errors import InputError, StfmWarning, WrongTypeError
from stfm._keys import SPATIAL
from stfm._validate import resolve_rng
from stfm.inference.features import use_frozen_features
from stfm.models._card import About
from stfm.models.base import Model
from stfm.models.registry import class_of, create, nearest_name
from stfm.slide.read import as_slides
from stfm.slide.slide import check_counted
from stfm.tl._models import resolve_model
from stfm.training.engine import fit_stages, resolve_accelerator, resolve_precision
from stfm.training.genes import make_vocabulary
from stfm.training.recipes import resolve_recipe
from stfm.training.split import split_slides
from stfm.training.tune import check_tune, tuned_stages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from stfm.models.inputs import SlideInputs
    from stfm.slide.slide import Slide
    from stfm.training.genes import Genes
    from stfm.training.recipes import Recipe
    from stfm.training.split import Validation

_MIN_SPOTS = 4
_SEEDS = 2**31
_MODEL = "st-align-small"
_N_GENES = 2000


def train(
    data: Any,
    model: str | Model | Any = _MODEL,
    *,
    stage: str | None = None,
    config: Mapping[str, Any] | None = None,
    genes: Genes = _N_GENES,
    recipe: Recipe | str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    patience: int | None = None,
    precision: str | None = None,
    tune: str | None = None,
    validation: Validation = "auto",
    library_key: str | None = None,
    patient_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    init: Model | str | Path | None = None,
    cache_features: bool = True,
    checkpoint_dir: str | Path | None = None,
    resume: str | Path | bool | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    rng: int | np.random.Generator | None = 0,
) -> Model:
    """Train a model on slides that have H&E and counts.

    Learning rate and weight decay follow cosines, the former after a linear warm-up (paper, section 4.1). Features of
    frozen image encoders are computed once and kept on disk; tiles are kept in memory as far as the recipe allows. With
    several devices batch norm is synchronized (on CUDA) and the negatives of a contrastive loss come from all of them;
    gradient accumulation does not add negatives.

    Parameters
    ----------
    data
        AnnData (one library or many), the path of an ``.h5ad`` file, a Slide, or a list of these.
    model
        Name of :func:`stfm.models.list_models`, a configuration, or a model (a copy of it is trained further).
    stage
        Of a model that is pretrained in stages (``storm``, ``storm-multibranch``): ``"mask"``, ``"align"``, or
        ``"both"`` one after the other, the default. A trained model that goes on with slides of one modality leaves
        out by itself, with a warning, what needs both.
    config
        Fields of the configuration to change, for example ``{"lambda1": 0.5}``.
    genes
        What a new model reads: a number of the most variable genes of the training slides, ``"all"``, or their names.
    recipe
        A ``stfm.training.recipes.Recipe``, or a preset's name (``"recommended"``, ``"paper"``, ``"small"``,
        ``"tiny"``, ``"storm"``, ``"storm-small"``, ``"storm-multibranch"``, ``"storm-multibranch-small"``,
        ``"contrastive"``). By default the one that a model to go on from was trained with, or that fits a new one.
    epochs, batch_size, lr, patience, precision
        Changes to the recipe: passes over the data, spots in a batch and device, highest learning rate, epochs without
        a better validation loss after which to stop, ``"auto"``, ``"fp32"`` or ``"bf16"``.
    tune
        What of a trained model (``init`` or ``model``) is trained further: ``"full"``, the default, all of it;
        ``"head"``: its decoders and alignment heads; ``"lora"``: these, and low-rank additions to the maps to queries
        and values of its blocks (through ``peft``), which are merged into the weights at the end.
    validation
        What is held out to choose the best epoch: ``"patient"``, ``"section"``, ``"auto"`` (patients if two are known,
        else sections if there are two, else nothing), a share of them, a list of slides or patients, or None.
    library_key
        Column of ``obs`` that names the library of a spot; found when there is only one candidate.
    patient_key
        Column of ``obs`` that names the patient; ``"patient"`` when it is there.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    layer
        Layer with raw counts; None takes ``X``.
    image
        H&E where it is neither in ``uns`` nor recorded by :func:`stfm.pp.tile`; or a mapping from library to it.
    mpp
        µm per px of the full-resolution image, where it is not to be found; or a mapping from library to it.
    init
        Saved model, its folder or the name of its weights (``"default"``), whose weights, configuration and genes to
        start from, instead of ``model`` and ``genes``. A model like the default then adds components of the slides
        (``slide_components`` of its configuration), by which its joint embedding becomes wider.
    cache_features
        Whether to keep the features of frozen image encoders on disk.
    checkpoint_dir
        Folder for ``last.ckpt``, written after each epoch.
    resume
        Checkpoint (or its folder) to go on from with otherwise the same call; True takes the one of
        ``checkpoint_dir`` if there is one, so that the same command starts a run and continues it after a kill.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"mps"``.
    devices
        Number of devices.
    rng
        Seed or generator of weights, split, order, augmentation and dropout.

    Returns
    -------
    The trained model in evaluation mode: ``history`` (DataFrame, a row an epoch: losses of training and validation,
    learning rate, weight decay, seconds, spots a second), ``seen`` (studies, slides, patients, recipe); ``save`` it
    with ``model.save(folder)``. One that was trained further names in ``seen.adapted_from``, and on its card, the
    models it comes from; of their cards only the licence stays.

    Raises
    ------
    InputError
        Data that cannot be trained on (counts all zero, spots at one place or off their image), a split that leaves
        nothing, or a checkpoint of another run.
    StfmError
        The loss became nan; the message names the batch, the last checkpoint stays.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, n_patients=2)
    >>> model = sf.tl.train(adata, "st-align-tiny", epochs=1)
    >>> list(model.history["epoch"])
    [0]
    """
    seed = int(rng) if isinstance(rng, int) else int(resolve_rng(rng).integers(_SEEDS))
    slides = as_slides(
        data, library_key=library_key, spatial_key=spatial_key, layer=layer, image=image, mpp=mpp,
        patient_key=patient_key,
    )  # fmt: skip
    check_counted(slides)
    kind = resolve_accelerator(accelerator, devices)
    start = _start(model, init, config, genes)
    plan = resolve_recipe(
        recipe, _named(model, start), epochs=epochs, batch_size=batch_size, lr=lr, patience=patience,
        precision=precision, tune=tune,
    )  # fmt: skip
    _check_tune(start, plan.tune)
    kept, held = split_slides(slides, validation, fraction=plan.validation_fraction, seed=seed)
    _check_size(kept)
    if plan.patience is not None and not held:
        msg = f"patience={plan.patience} has no effect, since no slide is held out (validation={validation!r})."
        warnings.warn(msg, StfmWarning, stacklevel=2)
    made = start if start is not None else _create(model, kept, genes, config, seed)

    def prepare(one: Model, inputs: Sequence[SlideInputs]) -> None:
        use_frozen_features(one, inputs, device=kind, cache=cache_features)

    plan = plan.replace(precision=resolve_precision(plan.precision, kind))
    stages = _stages(made, stage, plan.tune)
    if start is not None and stage is None:
        stages = _possible(made, stages, kept)
    return fit_stages(
        made, kept, plan, stages, validation=held, prepare=prepare, resume=resume,
        checkpoint_dir=checkpoint_dir, seed=seed, accelerator=kind, devices=devices,
    )  # fmt: skip


def _check_tune(start: Model | None, tune: str) -> None:
    """Refuse to adapt a model that has learned nothing yet, or that cannot be adapted so."""
    if tune != "full" and start is None:
        msg = f"tune={tune!r} adapts a trained model; give one (or its folder) as init=."
        raise InputError(msg)
    if start is not None:
        check_tune(start, tune)


def _stages(model: Model, stage: str | None, tune: str) -> tuple[str | None, ...]:
    """Return the stages to train in turn; (None,) for a model that has none."""
    if not model.stages:
        if stage is not None:
            msg = f"stage={stage!r} has no meaning for {model.family!r}, which is trained in one stage; leave it out."
            raise InputError(msg)
        return (None,)
    stages = tuned_stages(model, tune)
    if stage is None or stage == "both":
        return stages
    model.stage = stage  # refuses what is no stage of it
    if stage not in stages:
        msg = f"tune={tune!r} leaves nothing to train in stage {stage!r}; take stage={stages[0]!r}."
        raise InputError(msg)
    return (stage,)


def _possible(model: Model, stages: tuple[str | None, ...], slides: Sequence[Slide]) -> tuple[str | None, ...]:
    """Return the stages by which a trained model can go on with slides that may lack a modality."""
    lacking = [
        what
        for what, there in (("H&E", [s.tiles for s in slides]), ("counts", [s.counts for s in slides]))
        if all(one is None for one in there)
    ]
    left = tuple(stage for stage in stages if stage not in model.paired_stages)
    if not lacking or not left or left == stages:
        return stages
    msg = f"the slides have no {lacking[0]}, so the model goes on with stage={left[0]!r} alone; alignment needs both."
    warnings.warn(msg, StfmWarning, stacklevel=3)
    return left


def _start(model: Any, init: Model | str | Path | None, config: Mapping[str, Any] | None, genes: Genes) -> Model | None:
    """Return the model to go on from, if there is one."""
    source = init if init is not None else model if isinstance(model, Model) else None
    if source is None:
        return None
    if init is not None and not (isinstance(model, str) and model == _MODEL):
        msg = f"init= is the model to start from, so model={model!r} has no place beside it; leave one of them out."
        raise InputError(msg)
    if not (isinstance(genes, int) and genes == _N_GENES):
        msg = "genes= chooses what a new model reads; a model to go on from keeps its genes. Leave genes= out."
        raise InputError(msg)
    if config:
        msg = "config= changes a new model; a model to go on from keeps the configuration that it has."
        raise InputError(msg)
    if isinstance(source, Model):
        made = copy.deepcopy(source)
        return made if made.history is None else _adapted(made, made.about.name or made.family)
    if not isinstance(source, (str, Path)):
        msg = f"init must be a model or the folder of a saved one, got {type(source).__name__}."
        raise WrongTypeError(msg)
    made, where = resolve_model(source)
    # Of a folder no more than its name, since the card is to be shared.
    return _adapted(made, Path(where).resolve().name)


def _adapted(model: Model, name: str) -> Model:
    """Let a trained model say what it was before: what its card told of it is not true of what it will become.

    The licence stays, since the weights go on under it.
    """
    model.seen.adapted_from.append({"name": name, "weights_sha256": model.weights_sha256()})
    model.about = About(licence=model.about.licence)
    return model


def _named(model: Any, start: Model | None) -> str | Model:
    """Return that by which a recipe is found: the model to go on from, or the name of a new one."""
    if start is not None:
        return start
    return model if isinstance(model, str) else nearest_name(model)


def _create(model: Any, slides: Sequence[Slide], genes: Genes, config: Mapping[str, Any] | None, seed: int) -> Model:
    """Make a new model; the user's random numbers are left alone."""
    vocabulary = make_vocabulary(slides, genes) if class_of(model).reads_genes else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(model, vocabulary, **(config or {}))


def _check_size(slides: Sequence[Slide]) -> None:
    total = sum(s.n_obs for s in slides)
    if total < _MIN_SPOTS:
        msg = f"There are {total} spots to train on; a model needs at least {_MIN_SPOTS}, and learns from thousands."
        raise InputError(msg)
