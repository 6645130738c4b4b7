"""Schedules of learning rate and weight decay: plain functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

from stfm._errors import InputError

__all__ = ["cosine", "warmup_cosine"]


def cosine(step: float, total: float, *, start: float, end: float) -> float:
    """Move from ``start`` to ``end`` along half a cosine.

    Used for the weight decay of the paper, 0.04 -> 0.4 (section 4.1 says "cosine", which here rises, as in DINO).

    Parameters
    ----------
    step
        Steps done; may lie between two steps. Held at the ends outside ``0 .. total``.
    total
        Length of the schedule in steps.
    start
        Value at step 0.
    end
        Value at step ``total``.

    Returns
    -------
    The value at ``step``.

    Examples
    --------
    >>> [round(cosine(s, 4, start=0.04, end=0.4), 7) for s in range(5)]
    [0.04, 0.0927208, 0.22, 0.3472792, 0.4]
    """
    if total <= 0:
        msg = f"A schedule needs a positive number of steps, got {total}."
        raise InputError(msg)
    share = min(max(step / total, 0.0), 1.0)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * share))


def warmup_cosine(step: float, total: float, *, peak: float, warmup: float = 0.0, final: float = 0.0) -> float:
    """Rise linearly from 0 to ``peak`` over ``warmup`` steps, then fall to ``final`` along half a cosine.

    Parameters
    ----------
    step
        Steps done; may lie between two steps.
    total
        Length of the whole schedule in steps, the warm-up included.
    peak
        Highest value, reached at step ``warmup``.
    warmup
        Length of the linear rise in steps.
    final
        Value at step ``total``.

    Returns
    -------
    The value at ``step``.
    """
    if not 0 <= warmup < total:
        msg = f"The warm-up must be shorter than the schedule: {warmup} of {total} steps."
        raise InputError(msg)
    if step < warmup:
        return peak * max(step, 0.0) / warmup
    return cosine(step - warmup, total - warmup, start=peak, end=final)
