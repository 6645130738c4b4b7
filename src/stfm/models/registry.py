"""Models by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stfm._errors import InputError
from stfm._registry import Registry
from stfm._validate import did_you_mean
from stfm.encoders.registry import list_encoders as list_encoders
from stfm.models.base import Model, read_description
from stfm.weights._fetch import fetch
from stfm.weights.registry import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

    from stfm.slide.genes import Vocabulary


@dataclass(frozen=True)
class ModelSpec:
    """A row of the table of models.

    Attributes
    ----------
    name
        Name under which it is made.
    family
        Name of its class in saved models.
    summary
        What it is, in a line.
    reference
        The paper.
    factory
        Class of the model.
    config
        Makes the configuration.
    """

    name: str
    family: str
    summary: str
    reference: str
    factory: type[Model]
    config: Callable[[], Any]


def register_presets(
    models: Registry[ModelSpec],
    factory: type[Model],
    rows: Mapping[str, tuple[str, str]],
    *,
    reference: str,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Add the presets of a family: preset -> (registered name, what it is in a line).

    Parameters
    ----------
    models
        The registry.
    factory
        Class of the models; its configuration makes presets by name.
    rows
        Preset -> name and summary.
    reference
        The paper.
    aliases
        Other names by registered name.
    """
    for preset, (name, summary) in rows.items():
        spec = ModelSpec(
            name=name,
            family=factory.family,
            summary=summary,
            reference=reference,
            factory=factory,
            config=partial(factory.config_class.preset, preset),
        )
        models.register(name, spec, aliases=(aliases or {}).get(name, ()))


def _load_builtin() -> None:
    for module in ("st_align", "contrastive", "storm", "storm_multibranch", "distillation"):
        import_module(f"stfm.models.{module}").register(MODELS)


MODELS: Registry[ModelSpec] = Registry("model", entry_points_group="stfm.models", loader=_load_builtin)


def create(model: str | Any, vocabulary: Vocabulary | None = None, *, pretrained: bool = True, **changes: Any) -> Model:
    """Make a model with fresh weights.

    Parameters
    ----------
    model
        A name of :func:`list_models`, or a configuration.
    vocabulary
        Genes that the model reads and, where it predicts them, writes.
    pretrained
        Whether encoders take the weights that the configuration names.
    changes
        Fields of the configuration to change.

    Returns
    -------
    The model, in training mode.

    Examples
    --------
    >>> import numpy as np
    >>> import stfm as sf
    >>> from stfm.slide.genes import Vocabulary
    >>> genes = Vocabulary(np.array(["MBP", "PLP1", "SNAP25", "GFAP"]))
    >>> sf.models.create("st-align-tiny", genes).family
    'st-align'
    """
    if isinstance(model, str):
        spec = MODELS.get(model)
        factory, config = spec.factory, spec.config()
    else:
        factory, config = class_of(model), model
    names = [f.name for f in fields(config)]
    for name in changes:
        if name not in names:
            msg = f"{type(config).__name__} has no field {name!r}. {did_you_mean(name, names)}"
            raise InputError(msg)
    return factory(replace(config, **changes), vocabulary, pretrained=pretrained)


def load(folder: str | Path) -> Model:
    """Load a model that ``model.save(folder)`` wrote, or that comes under a name.

    Parameters
    ----------
    folder
        Folder with ``config.json`` and ``model.safetensors``; or a name of :func:`stfm.weights.list_weights`, such as
        ``"default"``, fetched where it is not there. (``"./default"`` is a folder in any case.)

    Returns
    -------
    The model, in evaluation mode; its weights are equal bit for bit where they were stored as fp32.

    Raises
    ------
    MissingKeyError
        There is no saved model in the folder, or its family is unknown.
    InputError
        The named weights are not there and cannot be fetched.
    DataIntegrityError
        The files do not fit together.
    """
    if isinstance(folder, str) and folder in WEIGHTS:
        if WEIGHTS.get(folder).kind != "model":
            msg = f"The weights {folder!r} are no model ({WEIGHTS.get(folder).kind}); see sf.weights.list_weights()."
            raise InputError(msg)
        folder = fetch(folder)
    family = read_description(Path(folder))["family"]
    for spec in MODELS:
        if spec.family == family:
            return spec.factory.load(folder)
    return MODELS.get(family).factory.load(folder)


def nearest_name(config: Any) -> str:
    """Return the registered name whose configuration is nearest: fewest fields differ; "" where there is none.

    Parameters
    ----------
    config
        Configuration of a model.
    """

    def different(spec: ModelSpec) -> int:
        other = spec.config()
        return sum(getattr(config, f.name) != getattr(other, f.name) for f in fields(config))

    same = [spec for spec in MODELS if type(config) is spec.factory.config_class]
    return min(same, key=different).name if same else ""


def list_models() -> pd.DataFrame:
    """Return the models that :func:`create` makes.

    Returns
    -------
    A row a model: family, summary, number of parameters (of a vocabulary of 2,000 genes), reference.
    """
    table = MODELS.frame()[["family", "summary", "reference"]]
    table.insert(2, "parameters", [_size(name) for name in table.index])
    return table


def _size(name: str) -> int:
    """Count parameters without making them (on the meta device)."""
    import numpy as np
    import torch

    from stfm.slide.genes import Vocabulary

    vocabulary = Vocabulary(np.array([f"GENE{i}" for i in range(2000)]))
    with torch.device("meta"):
        return create(name, vocabulary, pretrained=False).n_parameters


def class_of(model: str | Any) -> type[Model]:
    """Return the class of a model by its registered name or its configuration."""
    if isinstance(model, str):
        return MODELS.get(model).factory
    config = model
    for spec in MODELS:
        if type(config) is spec.factory.config_class:
            return spec.factory
    msg = (
        f"{type(config).__name__} is no configuration of a model; give one, or a name of sf.models.list_models(): "
        f"{', '.join(MODELS.names())}."
    )
    raise InputError(msg)
