"""The model that a function was given: itself, or the folder that it was saved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stfm._errors import InputError, MissingKeyError, WrongTypeError
from stfm._validate import did_you_mean
from stfm.models.base import CONFIG_FILE, Model
from stfm.models.registry import MODELS, load

__all__ = ["resolve_model"]


def resolve_model(model: Any) -> tuple[Model, str]:
    """Return the model and where it came from.

    Parameters
    ----------
    model
        A trained model (``"memory"``), or the folder that ``model.save(folder)`` wrote.

    Raises
    ------
    InputError
        No model is given, or the name of one, with which no weights come.
    MissingKeyError
        There is no such folder.
    WrongTypeError
        It is something else.
    """
    if isinstance(model, Model):
        return model, "memory"
    if model is None:
        msg = (
            "No weights come with this version: give model= a trained model (sf.tl.train) or the folder of a saved one."
        )
        raise InputError(msg)
    if not isinstance(model, (str, Path)):
        msg = f"model must be a model or the folder of a saved one, got {type(model).__name__}."
        raise WrongTypeError(msg)
    folder = Path(model).expanduser()
    if (folder / CONFIG_FILE).exists() or folder.is_dir():
        return load(folder), str(folder)
    if isinstance(model, str) and model in MODELS:
        msg = (
            f"No weights of {model!r} come with this version: train it (model = sf.tl.train(adata, {model!r})) "
            "and give the model, or the folder that it was saved to."
        )
        raise InputError(msg)
    msg = f"There is no folder {model!s} with a saved model. {did_you_mean(str(model), MODELS.names())}"
    raise MissingKeyError(msg)
