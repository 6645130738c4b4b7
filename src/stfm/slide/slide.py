"""One slide as a model sees it. Nothing from here on knows where a slide came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from stfm.slide.counts import Counts
    from stfm.slide.genes import Panel
    from stfm.slide.niches import NicheTable
    from stfm.slide.tiles import TileReader


@dataclass(frozen=True)
class Slide:
    """One library of one patient of one study.

    Attributes
    ----------
    name
        Name of the library.
    coords
        Coordinates, float64 ``(n, 2)`` or ``(n, 3)``: µm where ``mpp`` is known, else px.
    obs_names
        Names of the spots.
    rows
        Positions of the spots in the object that the slide was read from.
    counts
        Raw counts of the spots, or None for a slide of H&E alone.
    panel
        The genes of the columns of ``counts``.
    tiles
        Reader of H&E tiles around the spots, or None.
    niches
        Neighbours of each spot, or None.
    mpp
        µm per px of the full-resolution image, or None.
    spot_um, pitch_um
        Diameter of a spot and distance between neighbours, in µm, where known.
    niche_um
        Side of the square that holds a spot and its niche, in µm, where known.
    patient, study, platform, species
        Where the tissue comes from, where known.
    """

    name: str
    coords: NDArray[np.float64]
    obs_names: NDArray[np.str_]
    rows: NDArray[np.int64]
    counts: Counts | None = None
    panel: Panel | None = None
    tiles: TileReader | None = None
    niches: NicheTable | None = None
    mpp: float | None = None
    spot_um: float | None = None
    pitch_um: float | None = None
    niche_um: float | None = None
    patient: str | None = None
    study: str | None = None
    platform: str | None = None
    species: str | None = None

    def __post_init__(self) -> None:
        n = len(self.coords)
        parts = {"obs_names": self.obs_names, "rows": self.rows}
        for name, part in parts.items():
            if len(part) != n:
                msg = f"slide {self.name!r}: {name} has {len(part)} entries for {n} coordinates."
                raise InputError(msg)
        if self.counts is not None and (self.panel is None or self.counts.shape != (n, len(self.panel))):
            msg = f"slide {self.name!r}: counts need one row a spot ({n}) and a panel with one gene a column."
            raise InputError(msg)

    @property
    def n_obs(self) -> int:
        """Number of spots."""
        return len(self.coords)

    @property
    def unit(self) -> str:
        """Unit of the coordinates: ``"um"`` or ``"px"``."""
        return "px" if self.mpp is None else "um"

    def subset(self, indices: ArrayLike) -> Slide:
        """Return the slide with some of its spots; the niche table, which names all spots, is dropped."""
        index = np.arange(self.n_obs)[np.asarray(indices)]
        return replace(
            self,
            coords=self.coords[index],
            obs_names=self.obs_names[index],
            rows=self.rows[index],
            counts=None if self.counts is None else self.counts.subset(index),
            tiles=None if self.tiles is None else self.tiles.subset(index),
            niches=None,
        )

    def without(self, *modalities: str) -> Slide:
        """Return the slide without ``"image"`` or ``"gene"``, as if it had not been measured."""
        gone: dict[str, None] = {}
        for modality in modalities:
            if modality not in ("image", "gene"):
                msg = f"modalities are 'image' and 'gene', got {modality!r}."
                raise MissingKeyError(msg)
            gone |= {"tiles": None} if modality == "image" else {"counts": None, "panel": None}
        return replace(self, **gone)  # type: ignore[arg-type]

    def with_niches(
        self, n_neighbors: int = 3, *, radius: float | None = None, include_self: bool = False, ties: str = "index"
    ) -> Slide:
        """Return the slide with a niche table built afresh."""
        from stfm.slide.niches import knn

        table = knn(self.coords, n_neighbors, radius=radius, include_self=include_self, ties=ties)
        return replace(self, niches=table)


def check_counted(slides: Sequence[Slide]) -> None:
    """Refuse slides with counts that are all zero: what a model made of them would tell nothing.

    Parameters
    ----------
    slides
        Slides; those without counts are passed over.
    """
    for slide in slides:
        if slide.counts is not None and slide.n_obs and slide.counts.all_zero():
            msg = (
                f"Library {slide.name!r}: all counts of its {slide.n_obs} spots are zero; leave it out, name the "
                "layer with its counts (layer=), or, if it has H&E alone, give it without counts (adata.X = None)."
            )
            raise InputError(msg)
