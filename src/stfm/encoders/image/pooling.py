"""From what a backbone gives to one vector a tile: one choice for every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from stfm._errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["POOLINGS", "Pooling"]

#: own: the head of the published model; cls: class token; mean: mean over the last map or the patches of the last
#: block; stages: mean and standard deviation of every stage or chosen block; stage-means: the means alone
POOLINGS = ("own", "cls", "mean", "cls+mean", "stage-means", "stages")
#: other names
_SAME = {"last": "mean"}
#: blocks of a Transformer that are looked at unless others are named: the last of each quarter
_QUARTERS = 4


class Pooling:
    """How features are taken from a backbone.

    Parameters
    ----------
    kind
        One of ``"own"``, ``"cls"``, ``"mean"`` (also ``"last"``), ``"cls+mean"``, ``"stage-means"``, ``"stages"``.
    widths
        Channels of each stage or block, in order.
    final
        Width of the last map or of the last tokens; the last of ``widths`` unless it is given.
    own
        Width of the published model's own head, where it has one.
    cls
        Whether there is a class token.
    stages
        Positions of the stages that ``"stages"`` and ``"stage-means"`` read, negative ones from the end; None: every
        one of up to eight, else the last of each quarter.
    """

    def __init__(
        self,
        kind: str,
        *,
        widths: Sequence[int],
        final: int | None = None,
        own: int | None = None,
        cls: bool = False,
        stages: Sequence[int] | None = None,
    ) -> None:
        kind = _SAME.get(kind, kind)
        offered = [
            p for p in POOLINGS if not (("cls" in p and not cls) or (p == "own" and own is None))
        ]  # in the order of the names
        if kind not in offered:
            msg = f"pooling={kind!r} is not offered by this encoder; it has {', '.join(map(repr, offered))}."
            raise InputError(msg)
        self.kind = kind
        self.stages = _positions(stages, len(widths)) if kind.startswith("stage") else ()
        last = widths[-1] if final is None else final
        per_stage = sum(widths[i] for i in self.stages)
        self.width = {
            "own": own or 0,
            "cls": last,
            "mean": last,
            "cls+mean": 2 * last,
            "stage-means": per_stage,
            "stages": 2 * per_stage,
        }[kind]

    def takes(self, stage: int) -> bool:
        """Return whether a stage is looked at."""
        return stage in self.stages

    def moments(self, values: Tensor) -> Tensor:
        """Return what is kept of a stage: its mean, ``(b, d)``, or mean and deviation, ``(b, 2 d)``.

        Parameters
        ----------
        values
            Tokens ``(b, n, d)`` or a map ``(b, d, h, w)``.
        """
        x = values.flatten(2) if values.ndim == 4 else values.transpose(1, 2)
        x = x.float()  # a variance needs 32 bits
        mean = x.mean(dim=2)
        if self.kind == "stage-means":
            return mean.to(values.dtype)
        deviation = x.var(dim=2, correction=0).clamp_min(1e-12).sqrt()
        return torch.cat([mean, deviation], dim=1).to(values.dtype)

    def join(
        self, stages: Sequence[Tensor], *, patches: Tensor, cls: Tensor | None = None, own: Tensor | None = None
    ) -> Tensor:
        """Return ``(b, width)``.

        Parameters
        ----------
        stages
            :meth:`moments` of the stages looked at.
        patches
            Tokens of the patches ``(b, n, d)`` after the last norm, or the last map ``(b, d, h, w)``.
        cls
            Class token after the last norm, ``(b, d)``.
        own
            What the published model's own head gives, ``(b, d)``.
        """
        if self.stages:
            return torch.cat(list(stages), dim=1)
        if self.kind == "own" and own is not None:
            return own
        if self.kind == "cls" and cls is not None:
            return cls
        mean = patches.mean(dim=(2, 3)) if patches.ndim == 4 else patches.mean(dim=1)
        return mean if cls is None or self.kind == "mean" else torch.cat([cls, mean], dim=1)


def _positions(stages: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if stages is None:
        every = range(n)
        return tuple(every) if n <= 2 * _QUARTERS else tuple((i + 1) * n // _QUARTERS - 1 for i in range(_QUARTERS))
    if not isinstance(stages, Sequence) or not stages or any(s not in range(-n, n) for s in stages):
        msg = f"stages must be positions of the {n} stages of this encoder (-{n}..{n - 1}), got {stages!r}."
        raise InputError(msg)
    return tuple(sorted({int(s) % n for s in stages}))
