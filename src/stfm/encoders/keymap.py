"""Key maps: the same network under the parameter names of several publishers, read and written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["KeyMap"]

# What stands for a placeholder: {k} a kind of parameter, {s} the rest of a name, any other letter a number.
_PLACEHOLDERS = {"k": "weight|bias", "s": ".+"}


@dataclass(frozen=True)
class KeyMap:
    """How another public layout names the parameters of a network of stfm.

    Names may hold placeholders: ``{k}`` (``weight`` or ``bias``), ``{s}`` (the rest), any other letter (a number); the
    other side repeats them.

    Parameters
    ----------
    name
        What the layout is called.
    sign
        Regular expression; a state dict is of this layout if one of its keys matches. "" matches any.
    renames
        Pairs (theirs, ours). What none of them matches keeps its name.
    fused
        Pairs (their names, ours) of maps that are one here, joined in this order.
    transposed
        Our names of matrices that lie the other way round there.
    dropped
        Regular expressions of their keys that have no place here: classifiers, other towers, constant buffers.
    """

    name: str
    sign: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[tuple[str, ...], str], ...] = ()
    transposed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state dict is of this layout."""
        return not self.sign or any(re.fullmatch(self.sign, key) for key in state)

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of this layout in the names of stfm.

        Parts of what is joined here are left out unless all are there: the loader then names what is missing.
        """
        out: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, value in state.items():
            if any(re.fullmatch(pattern, key) for pattern in self.dropped):
                continue
            piece = self._piece(key)
            if piece is not None:
                name, position = piece
                parts.setdefault(name, {})[position] = value
            else:
                name = _renamed(key, self.renames)
                out[name] = value.T if name in self.transposed and value.ndim == 2 else value
        for (name, found), wanted in ((item, self._n_pieces(item[0])) for item in parts.items()):
            same = len({tuple(value.shape[1:]) for value in found.values()}) == 1
            if len(found) == wanted and same:
                out[name] = torch.cat([found[i] for i in range(wanted)])
        return out

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict in the names of stfm as this layout names it (without what it drops)."""
        back = tuple((ours, theirs) for theirs, ours in self.renames)
        out: dict[str, Tensor] = {}
        for key, value in state.items():
            for names, ours in self.fused:
                found = _pattern(ours).fullmatch(key)
                if found:
                    pieces = value.chunk(len(names))
                    out.update({n.format(**found.groupdict()): p for n, p in zip(names, pieces, strict=True)})
                    break
            else:
                out[_renamed(key, back)] = value.T if key in self.transposed else value
        return out

    def _piece(self, key: str) -> tuple[str, int] | None:
        """Return our name of what a key is a part of, and which part."""
        for names, ours in self.fused:
            for position, theirs in enumerate(names):
                found = _pattern(theirs).fullmatch(key)
                if found:
                    return ours.format(**found.groupdict()), position
        return None

    def _n_pieces(self, name: str) -> int:
        return next(len(names) for names, ours in self.fused if _pattern(ours).fullmatch(name))


@lru_cache(maxsize=512)
def _pattern(name: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w)\}", name)
    text = ""
    for i, piece in enumerate(pieces):
        text += f"(?P<{piece}>{_PLACEHOLDERS.get(piece, r'[0-9]+')})" if i % 2 else re.escape(piece)
    return re.compile(text)


def _renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in renames:
        found = _pattern(old).fullmatch(key)
        if found:
            return new.format(**found.groupdict())
    return key
