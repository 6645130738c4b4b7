"""Splits that keep what belongs together on one side, and name the offenders where a split does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError
from stfm._validate import check_count, resolve_rng

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Split:
    """One train / test split: rows of each side, int64, sorted."""

    name: str
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def _labels(name: str, labels: ArrayLike, n: int | None = None) -> NDArray[np.str_]:
    import pandas as pd

    values = np.asarray(labels, dtype=object)
    if values.ndim != 1 or len(values) == 0:
        msg = f"{name} must be a list with one label a row, got shape {values.shape}."
        raise InputError(msg)
    if n is not None and len(values) != n:
        msg = f"{name} has {len(values)} labels for {n} rows."
        raise InputError(msg)
    missing = pd.isna(values)
    if missing.any():
        msg = f"{name} is missing for {int(missing.sum())} rows; a row of unknown origin cannot be split safely."
        raise InputError(msg)
    return values.astype(str)


def check_leakage(train: ArrayLike, test: ArrayLike, *, what: str = "patient") -> None:
    """Refuse a split whose two sides share a group, and name the groups.

    Parameters
    ----------
    train, test
        Group (patient, section, slide, study) of each row of either side.
    what
        What the groups are, for the message.

    Raises
    ------
    InputError
        A group is on both sides.

    Examples
    --------
    >>> from stfm import metrics
    >>> metrics.check_leakage(["A", "B"], ["C"])
    """
    shared = sorted(set(_labels("train", train)) & set(_labels("test", test)))
    if shared:
        shown = ", ".join(repr(str(name)) for name in shared[:8]) + (" …" if len(shared) > 8 else "")
        msg = f"{what} {shown} {'is' if len(shared) == 1 else 'are'} in training and test; split by {what}."
        raise InputError(msg)


def _checked(split: Split, patients: NDArray[np.str_] | None) -> Split:
    if patients is not None:
        check_leakage(patients[split.train], patients[split.test])
    return split


def leave_one_group_out(groups: ArrayLike, *, patients: ArrayLike | None = None) -> list[Split]:
    """Hold out each group in turn.

    Parameters
    ----------
    groups
        Section, slide or patient of each row.
    patients
        Patient of each row, where groups are something finer. A patient that would lie on both sides is then an error;
        leave it out to say that sections of one patient may (and name that in the report).

    Returns
    -------
    One :class:`Split` a group, in order of first appearance.

    Raises
    ------
    InputError
        Fewer than two groups, labels that are missing, or a patient on both sides (named).

    Examples
    --------
    >>> from stfm import metrics
    >>> [split.name for split in metrics.leave_one_group_out(["A", "A", "B", "C"])]
    ['A', 'B', 'C']
    >>> metrics.leave_one_group_out(["A", "A", "B", "C"])[0].test
    array([0, 1])
    """
    labels = _labels("groups", groups)
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        msg = f"there is one group only ({str(names[0])!r}); nothing would be left to train on."
        raise InputError(msg)
    owner = None if patients is None else _labels("patients", patients, len(labels))
    return [_checked(Split(str(n), np.flatnonzero(labels != n), np.flatnonzero(labels == n)), owner) for n in names]


def k_fold(
    groups: ArrayLike,
    n_splits: int = 5,
    *,
    patients: ArrayLike | None = None,
    rng: int | np.random.Generator | None = 0,
) -> list[Split]:
    """Deal whole groups into folds of about the same number of rows.

    Parameters
    ----------
    groups
        Group of each row; a group is never cut.
    n_splits
        Number of folds.
    patients
        Patient of each row, where groups are something finer; a patient on both sides is an error.
    rng
        Seed or generator that shuffles groups of the same size.

    Returns
    -------
    ``n_splits`` splits named ``fold1``, ``fold2`` …

    Raises
    ------
    InputError
        Fewer groups than folds, labels that are missing, or a patient on both sides (named).

    Examples
    --------
    >>> from stfm import metrics
    >>> [split.test.tolist() for split in metrics.k_fold(["A", "A", "B", "C"], n_splits=2)]
    [[0, 1], [2, 3]]
    """
    check_count("n_splits", n_splits, minimum=2)
    labels = _labels("groups", groups)
    names, sizes = np.unique(labels, return_counts=True)
    if len(names) < n_splits:
        msg = f"{len(names)} groups cannot fill n_splits={n_splits} folds; lower n_splits."
        raise InputError(msg)
    owner = None if patients is None else _labels("patients", patients, len(labels))
    shuffled = resolve_rng(rng).permutation(len(names))
    fold_of: dict[str, int] = {}
    load = np.zeros(n_splits, dtype=np.int64)
    for i in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        lightest = int(np.argmin(load))
        fold_of[str(names[i])] = lightest
        load[lightest] += sizes[i]
    fold = np.array([fold_of[label] for label in labels])
    return [
        _checked(Split(f"fold{k + 1}", np.flatnonzero(fold != k), np.flatnonzero(fold == k)), owner)
        for k in range(n_splits)
    ]


def spots_within_slides(
    slides: ArrayLike, *, test_fraction: float = 0.2, rng: int | np.random.Generator | None = 0
) -> list[Split]:
    """Split the spots of every slide at random: the paper's own protocol, which leaks through neighbouring spots.

    A test spot has training spots beside it whose tiles and niches overlap its own, so a score under this split says
    little about another slide. It is here to stand beside :func:`leave_one_group_out`, not instead of it.

    Parameters
    ----------
    slides
        Slide of each row.
    test_fraction
        Share of the spots of each slide that is held out.
    rng
        Seed or generator.

    Returns
    -------
    One :class:`Split` a slide; both sides of it lie on that slide.

    Examples
    --------
    >>> from stfm import metrics
    >>> (split,) = metrics.spots_within_slides(["A"] * 10)
    >>> len(split.train), len(split.test)
    (8, 2)
    """
    if not 0 < test_fraction < 1:
        msg = f"test_fraction must lie between 0 and 1, got {test_fraction}."
        raise InputError(msg)
    labels = _labels("slides", slides)
    generator = resolve_rng(rng)
    splits = []
    for name in dict.fromkeys(labels):
        rows = generator.permutation(np.flatnonzero(labels == name))
        n_test = round(test_fraction * len(rows))
        if not 0 < n_test < len(rows):
            msg = f"slide {str(name)!r} has {len(rows)} spots: too few for test_fraction={test_fraction}."
            raise InputError(msg)
        splits.append(Split(str(name), np.sort(rows[n_test:]), np.sort(rows[:n_test])))
    return splits
