"""Slides that the default model never saw, and the embeddings that stand beside its own."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _domains as simple
import numpy as np
import pandas as pd
import torch
from _storm_domains import RECIPE, variable_genes

import stfm as sf
from stfm.errors import StfmWarning
from stfm.slide import Slide, as_slides

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretraining"))
import _slides

LABELLED_SLIDES = ("her2st:E1", "her2st:G2", "dlpfc:151675", "mob:rep11")
#: what the slides kept out of pretraining are called in what a model saw
KEPT_OUT = tuple("MOB3" if name == "mob:3" else name.partition(":")[2] for name in _slides.KEPT_OUT)
WITH_IMAGE = ("dlpfc:151675", "mob:3")

DEFAULT, RANDOM, SCRATCH = "default, zero-shot", "random weights", "STORM trained on the slide itself"
ADAPTED = "default, adapted to the slide"
TWICE = "PCA 15, twice over two rings, majority"
COORDINATES, IMAGE = "coordinates", "default, H&E alone"
PCA_ROWS = {
    "PCA 30": simple.gene_pca(),
    "PCA 30 averaged over self + ring 1": simple.smoothed(simple.gene_pca()),
    "PCA 30 averaged over self + two rings": simple.smoothed(simple.gene_pca(), rings=2),
    TWICE: simple.smoothed(simple.gene_pca(15), rings=2, times=2),
}
DOMAIN_ROWS = (
    DEFAULT, "PCA 30", "PCA 30 averaged over self + ring 1", TWICE, RANDOM, SCRATCH,
)  # fmt: skip
ANNOTATION_ROWS = (
    DEFAULT, "PCA 30", "PCA 30 averaged over self + ring 1", "PCA 30 averaged over self + two rings", COORDINATES,
    RANDOM, SCRATCH, IMAGE,
)  # fmt: skip
#: rows that are made anew for each seed
DRAWN = (RANDOM, SCRATCH, ADAPTED)

#: of a model with random weights: what is known of genes and of the tissue's scale, without which its embedding is 0
_KEPT = ("table.", "field.", "trained_on", "typical_total")


@dataclass
class Rows:
    """The model under test, where the data lie, and every embedding that was made so far."""

    model: sf.models.Model
    data: Path
    made: dict[tuple[Any, ...], dict[str, np.ndarray]] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)

    def adata(self, name: str) -> Any:
        """Return a slide; ``obs["label"]`` is nan where nothing is labelled."""
        if name not in self.read:
            self.read[name] = read(name, self.data)
        return self.read[name]

    def truth(self, name: str) -> np.ndarray:
        """Return labels as integers, -1 where there is none."""
        codes, _ = pd.factorize(self.adata(name).obs["label"].astype(object), sort=True)
        return np.asarray(codes)

    def parts(self, row: str, name: str, seed: int) -> dict[str, np.ndarray]:
        """Return the joint embedding of a row and, of a model, those of the modalities."""
        key = (row, name, seed if row in DRAWN else 0)
        if key not in self.made:
            self.made[key] = self._make(row, name, key[-1])
        return self.made[key]

    def _make(self, row: str, name: str, seed: int) -> dict[str, np.ndarray]:
        adata = self.adata(name)
        if row == COORDINATES:
            return {"joint": adata.obsm["spatial"][:, :2]}
        if row in PCA_ROWS:
            return {"joint": PCA_ROWS[row](adata, seed)}
        if row == IMAGE:
            return {"joint": self.parts(DEFAULT, name, seed)["image"]}
        if row == DEFAULT:
            return embed(self.model, adata, name)
        if row == RANDOM:
            return embed(random_weights(self.model, seed), adata, name)
        if row == SCRATCH:
            return embed(from_scratch(adata, name, seed), adata, name)
        adapted, self.seconds[name, seed] = adapt(self.model, adata, name, seed)
        return embed(adapted, adata, name)


def read(name: str, data: Path) -> Any:
    """Read a slide; coordinates of the bulb from array positions, which are 200 µm apart."""
    adata = _slides.read(name, data)
    if name == "mob:rep11":
        adata.obsm["spatial"] = adata.obsm["spatial"] * 200.0
        adata.obs["library_id"] = "rep11"
    if "label" in adata.obs:
        label = adata.obs["label"].astype(object)
        adata.obs["label"] = label.where((label != "undetermined") & label.notna())
    return adata


def where(name: str) -> dict[str, Any]:
    """Return what has to be said of a slide beside its object."""
    return {"mpp": 1.0} if name == "mob:rep11" else {}


def embed(model: sf.models.Model, adata: Any, name: str) -> dict[str, np.ndarray]:
    """Return the embeddings of a slide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StfmWarning)  # that an adapted model saw the slide is the point
        made = sf.tl.embed(adata, model, copy=True, **where(name))
    parts = {part: made.obsm[f"X_stfm_{part}"] for part in ("image", "gene") if f"X_stfm_{part}" in made.obsm}
    return {"joint": made.obsm["X_stfm"], **parts}


def random_weights(model: sf.models.Model, seed: int) -> sf.models.Model:
    """Return the same model with all of its weights drawn anew, tower and gene table among them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = sf.models.create(model.config, model.vocabulary, pretrained=False)
    known = dict(model.named_buffers())
    for key, buffer in drawn.named_buffers():
        if key.startswith(_KEPT):
            buffer.copy_(known[key])
    return drawn.eval()


def from_scratch(adata: Any, name: str, seed: int) -> sf.models.Model:
    """Train STORM on a slide's counts, as benchmarks/storm.py does for spatial domains."""
    slides = as_slides(adata, modalities=("gene",), **where(name))
    return sf.tl.train(
        slides, "storm-small", stage="mask", config={"image": None, "linear_blend": 0.0}, genes=variable_genes(slides),
        validation=None, rng=seed, recipe=RECIPE,
    )  # fmt: skip


def adapt(model: sf.models.Model, adata: Any, name: str, seed: int) -> tuple[sf.models.Model, float]:
    """Train the model further on a slide with default arguments; return it and the seconds.

    Alignment needs H&E, so a slide without is masked alone. The first seed finds no image features on disk.
    """
    stage: Mapping[str, Any] = {} if name in WITH_IMAGE else {"stage": "mask"}
    with tempfile.TemporaryDirectory() as empty, contextlib.ExitStack() as stack:
        if seed == 0:
            stack.enter_context(sf.settings.override(cache_dir=empty))
        start = time.perf_counter()
        adapted = sf.tl.train(adata, init=model, rng=seed, **stage, **where(name))
        return adapted, time.perf_counter() - start


def halves(adata: Any) -> dict[str, Any]:
    """Cut a slide in two at the median of x."""
    x = adata.obsm["spatial"][:, 0]
    left = x <= np.median(x)
    return {"left": adata[left].copy(), "right": adata[~left].copy()}


def as_slide(adata: Any) -> Slide:
    """Return a single slide."""
    return as_slides(adata)[0]
