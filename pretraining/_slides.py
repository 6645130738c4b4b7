"""The slides of the pretraining recipe, and places to learn tissue from between their spots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np

import stfm as sf
from stfm.slide import Slide, as_slides
from stfm.slide.tiles import TileReader

#: H&E and counts
PAIRED = ("her2st:C2", "her2st:C3", "her2st:C4", "her2st:C5", "her2st:B4", "mob:1", "mob:2")
#: those whose H&E the tower learns from; more of it made the tower forget what it started from (docs/decisions.md)
TOWER = ("her2st:C5", "mob:2")
#: counts alone
COUNTS = (
    "her2st:B1", "her2st:B2", "her2st:C1", "her2st:D1", "her2st:D3", "her2st:F1", "her2st:H1", "her2st:H2",
    "dlpfc:151673", "dlpfc:151674",
)  # fmt: skip
#: never read by the recipe: what the default is measured on
KEPT_OUT = ("her2st:E1", "her2st:E2", "her2st:G1", "her2st:G2", "mob:3", "mob:rep11", "dlpfc:151675")

_WHITE = 215


def read(name: str, data: Path) -> ad.AnnData:
    """Read one slide by its name, from ``data/cache`` (as ``stfm.datasets`` fetches) or ``data/h5ad``."""
    study, _, section = name.partition(":")
    if study == "dlpfc":
        adata = ad.read_h5ad(data / "h5ad" / f"dlpfc_{section}.h5ad")
        adata.obs["library_id"], adata.obs["patient"] = section, "Br8100"
        adata.uns["spatial"][section]["scalefactors"].pop("spot_diameter_fullres", None)  # contradicts the lattice
        return adata
    if name == "mob:rep11":
        return ad.read_h5ad(data / "h5ad" / "mob_rep11.h5ad")
    with sf.settings.override(cache_dir=data / "cache", offline=True):
        return sf.datasets.load(name)


def read_slides(names: Iterable[str], data: Path) -> list[Slide]:
    """Read slides; those of :data:`COUNTS` without their H&E, which they have none of or at 16 µm/px."""
    slides = []
    for name in names:
        (slide,) = as_slides(read(name, data))
        slide = replace(slide, study=slide.study or name.partition(":")[0])
        slides.append(replace(slide, tiles=None) if name in COUNTS else slide)
    return slides


def between_spots(slide: Slide, size_um: float, *, step_um: float = 60.0) -> Slide:
    """Return a slide of H&E alone: places every ``step_um`` over the tissue that the spots cover, tiles of one size."""
    if slide.tiles is None or slide.mpp is None:
        raise SystemExit(f"slide {slide.name} has no H&E to learn from")
    low, high = slide.coords[:, :2].min(axis=0), slide.coords[:, :2].max(axis=0)
    axes = [np.arange(a, b + step_um, step_um) for a, b in zip(low, high, strict=True)]
    places = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    reader = TileReader(slide.tiles.source, places / slide.mpp, slide.mpp, image_scale=slide.tiles.image_scale)
    look = reader.read(np.arange(len(places)), size_um=step_um, size_px=8)
    tissue = np.flatnonzero(look.reshape(len(places), -1).mean(axis=1) < _WHITE)
    return replace(
        slide,
        name=f"{slide.name}, {size_um:.0f} µm",
        coords=places[tissue],
        obs_names=np.array([f"{slide.name}-{i}" for i in tissue]),
        rows=np.arange(len(tissue)),
        counts=None,
        panel=None,
        tiles=reader.subset(tissue),
        niches=None,
        spot_um=size_um,
        niche_um=size_um,
    )


def at_scales(slides: Sequence[Slide], sizes_um: Sequence[float] = (112.0, 224.0, 448.0)) -> list[Slide]:
    """Return the tissue of all slides that have H&E, once for each size of tile."""
    return [between_spots(slide, size) for slide in slides if slide.tiles is not None for size in sizes_um]
