"""Weights and tiles by formula, the same in the script that makes the reference features and in the tests.

Every tensor is drawn by a generator that is seeded with the CRC-32 of its name: ``u`` is standard normal.

* two dimensions or more: ``u / sqrt(fan in)``; tokens and tables of positions ``0.5 u``;
* one dimension, a scale (``weight``, ``gamma``, ``lambda1``, ``running_var``): ``1 + tanh(u) / 2``; else ``0.1 u``;
* counters: zero; other scalars: ``u``.
"""

from __future__ import annotations

import zlib

import numpy as np

SCALES = ("weight", "gamma", "lambda1", "running_var")
TABLES = ("token", "embed", "class_embedding", "position", "query")
#: how many numbers of each feature vector are kept, evenly spaced
KEPT = 48
N_TILES = 2


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the tensor of a name."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    u = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    last = name.rpartition(".")[2]
    if len(shape) == 0:
        return u
    if len(shape) == 1 and "class_embedding" not in name:
        return 1 + np.tanh(u) / 2 if last in SCALES else np.float32(0.1) * u
    if "proj" not in name and "attn" not in name and any(table in last or table in name for table in TABLES):
        return np.float32(0.5) * u
    return u / np.float32(np.sqrt(np.prod(shape[1:])))


def tiles(px: int) -> np.ndarray:
    """Return tiles, uint8 ``(2, 3, px, px)``: noise of two scales, so that early and late layers see something."""
    rng = np.random.default_rng(7)
    coarse = np.kron(rng.integers(0, 160, (N_TILES, 3, px // 16, px // 16)), np.ones((1, 1, 16, 16), dtype=np.int64))
    return (coarse + rng.integers(0, 96, coarse.shape)).astype(np.uint8)


def kept(features: np.ndarray) -> np.ndarray:
    """Return the numbers of feature vectors ``(b, f)`` that are stored."""
    return features[:, np.linspace(0, features.shape[1] - 1, KEPT).round().astype(int)]
