"""``pl.training``: how a training went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import InputError, WrongTypeError
from stfm._palette import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

_SPLITS = {"train": ("-", "training"), "val": ("--", "validation")}


def training(history: Any, losses: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw the losses of a training by epoch, training against validation.

    Parameters
    ----------
    history
        A trained model, or its ``history`` (DataFrame with a row an epoch).
    losses
        Names of the losses to draw; all of them by default.
    ax
        Axes to draw into; new ones by default.

    Returns
    -------
    The Axes: a colour a loss, solid for training and dashed for validation; the best epoch of the validation loss is
    marked.

    Raises
    ------
    InputError
        There is no history (the model was not trained), or it has no such loss.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "st-align-tiny", epochs=1)
    >>> ax = sf.pl.training(model)
    """
    from matplotlib.ticker import MaxNLocator

    from stfm.pl._spatial import axes_for

    table = _table(history)
    curves = _curves(table)
    names = list(curves) if losses is None else list(losses)
    absent = [name for name in names if name not in curves]
    if absent:
        msg = f"the history has no loss {absent[0]!r}; it has: {', '.join(curves)}."
        raise InputError(msg)
    axis: Axes = axes_for(1, ax, inches=(6.4, 3.6))[0]
    epochs = table["epoch"].to_numpy() if "epoch" in table else np.arange(len(table))
    marker = "o" if len(table) == 1 else None
    for color, name in zip(CATEGORIES, names, strict=False):
        for split, column in curves[name].items():
            style, word = _SPLITS[split]
            values = table[column].to_numpy(dtype=np.float64)
            there = np.isfinite(values)
            width = 2.0 if name == "loss" else 1.2
            axis.plot(
                epochs[there], values[there], style, color=color, linewidth=width, marker=marker,
                label=f"{name.replace('_', ' ')}, {word}",
            )  # fmt: skip
    _mark_best(axis, epochs, table, curves)
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_ylabel("loss", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_title("training", fontsize=10)
    return axis


def _table(history: Any) -> pd.DataFrame:
    import pandas as pd

    table = history if isinstance(history, pd.DataFrame) else getattr(history, "history", history)
    if table is None or (isinstance(table, pd.DataFrame) and table.empty):
        msg = "there is no history: the model was not trained (sf.tl.train)."
        raise InputError(msg)
    if not isinstance(table, pd.DataFrame):
        msg = f"history must be a trained model or its history, got {type(history).__name__}."
        raise WrongTypeError(msg)
    return table


def _curves(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Return loss -> split -> column, the total first."""
    found: dict[str, dict[str, str]] = {}
    for column in map(str, table.columns):
        for split in _SPLITS:
            for mark in ("_", "/"):
                if column.startswith(split + mark):
                    found.setdefault(column[len(split) + 1 :], {})[split] = column
    if not found:
        msg = f"the history has no column of losses (train_…, val_…); it has: {', '.join(map(str, table.columns))}."
        raise InputError(msg)
    return dict(sorted(found.items(), key=lambda item: item[0] != "loss"))


def _mark_best(ax: Axes, epochs: Any, table: pd.DataFrame, curves: dict[str, dict[str, str]]) -> None:
    column = curves.get("loss", {}).get("val")
    if column is None or not np.isfinite(table[column].to_numpy(dtype=np.float64)).any():
        return
    values = table[column].to_numpy(dtype=np.float64)
    best = int(np.nanargmin(values))
    ax.plot(
        [epochs[best]], [values[best]], "o", color=CATEGORIES[0], markersize=6, markerfacecolor="white", zorder=4,
        label=f"best, epoch {epochs[best]}",
    )  # fmt: skip
