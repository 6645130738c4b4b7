"""One tissue measured by several platforms: is the same place found again by its embedding?

A model is trained on one platform and embeds another. For every query spot of the target, the gallery holds the spot of
the source at the same place and others drawn at random; recall@k is the share of queries for which the right one is
among the k nearest by cosine. Chance is k over the size of the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from _common import table as markdown

import stfm as sf

GALLERY = 256
TOP = (1, 5, 10)
#: source platform -> target platforms of the toy tissue
PAIRS = (("visium", "cells"), ("visium", "st"), ("cells", "visium"))


def same_tissue(layout: str, rng: int) -> Any:
    """Return the tissue of a seed as a platform measures it."""
    spots = {"visium": 900, "st": 400, "cells": 3000}[layout]
    return sf.datasets.toy(n_spots=spots, layout=layout, rng=rng)


def recall(source: np.ndarray, target: np.ndarray, match: np.ndarray, *, rng: int = 0) -> dict[int, float]:
    """Return recall@k: ``match`` is the row of ``source`` at the place of each row of ``target``."""
    generator = np.random.default_rng(rng)
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (source, target)]
    ranks = []
    for query, right in enumerate(match):
        others = generator.choice(np.delete(np.arange(len(source)), right), GALLERY - 1, replace=False)
        similarity = unit[0][others] @ unit[1][query]
        ranks.append(int((similarity > unit[0][right] @ unit[1][query]).sum()))
    return {k: float(np.mean(np.array(ranks) < k)) for k in TOP}
