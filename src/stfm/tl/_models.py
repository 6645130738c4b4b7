"""The model that a function was given: itself, a folder that it was saved to, a name, or the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stfm._errors import InputError, MissingKeyError, WrongTypeError
from stfm._validate import did_you_mean
from stfm.models.base import CONFIG_FILE, Model
from stfm.models.registry import MODELS, load
from stfm.weights._fetch import path
from stfm.weights.registry import WEIGHTS

__all__ = ["DEFAULT", "resolve_model"]

#: row of the weights that are taken where no model is given
DEFAULT = "default"


def resolve_model(model: Any) -> tuple[Model, str]:
    """Return the model and where it came from.

    Parameters
    ----------
    model
        A trained model (``"memory"``), the folder that ``model.save(folder)`` wrote, a name of
        ``sf.weights.list_weights()`` (``"<name>@<version>"``), or None for the default.

    Raises
    ------
    InputError
        The weights are not there, or it is the name of a model with which no weights come.
    MissingKeyError
        There is no such folder.
    WrongTypeError
        It is something else.
    """
    if isinstance(model, Model):
        return model, "memory"
    if model is None:
        model = DEFAULT
    if not isinstance(model, (str, Path)):
        msg = f"model must be a model or the folder (or name) of a saved one, got {type(model).__name__}."
        raise WrongTypeError(msg)
    if isinstance(model, str) and model in WEIGHTS:
        if model == DEFAULT:
            _check_default()
        return load(model), WEIGHTS.get(model).label
    folder = Path(model).expanduser()
    if (folder / CONFIG_FILE).exists() or folder.is_dir():
        return load(folder), str(folder)
    if isinstance(model, str) and model in MODELS:
        msg = (
            f"No weights of {model!r} come with this version: train it (model = sf.tl.train(adata, {model!r})) "
            "and give the model, or the folder that it was saved to."
        )
        raise InputError(msg)
    loadable = [spec.name for spec in WEIGHTS if spec.kind == "model"]
    msg = f"There is no folder {model!s} with a saved model. {did_you_mean(str(model), loadable, also=MODELS.names())}"
    raise MissingKeyError(msg)


def _check_default() -> None:
    """Say what to do in a version that was built without the default's weights."""
    try:
        path(DEFAULT)
    except InputError as error:
        msg = (
            "The default's weights do not come with this version: give a trained model (sf.tl.train) "
            "or the folder of a saved one."
        )
        raise InputError(msg) from error
