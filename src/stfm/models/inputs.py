"""From a slide and a list of spots to a batch: what training and inference share."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stfm._errors import InputError
from stfm.nn.batch import Batch
from stfm.slide.gene_match import GeneMatch, match_genes
from stfm.slide.genes import Vocabulary
from stfm.slide.niches import NicheTable, niche_mean
from stfm.slide.normalise import log_normalise
from stfm.slide.windows import window_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from scipy import sparse

    from stfm.slide.slide import Slide
    from stfm.slide.tiles import TileReader

_BLOCK = 2048  # rows read at once for the mean of a slide


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to see of every spot.

    Attributes
    ----------
    spot_px, niche_px
        Sides of the tiles in px; None where the model reads no such tile.
    spot_um, niche_um
        Sides of the tiles in µm; None takes the slide's own (diameter of the spot; square that holds its niche).
    contexts_um
        Sides in µm of several tiles around a spot, all shown at ``spot_px``, in place of the one of ``spot_um``.
    window
        Spots in the window around a spot that is read with it; None reads spots by themselves.
    counts, niche_counts
        Whether the model reads the spot's counts and those of its niche.
    n_neighbors, include_self, ties
        The niche, where the slide has no table of its own (``pp.build_niches`` explains the options).
    centre
        Of what the slide's mean is subtracted (shifts of batch and stain): ``"gene"``, log counts; ``"image"``, frozen
        features.
    standardise
        Divide what is centred of H&E by the slide's deviation, too.
    min_fraction
        Smallest share of genes that must match the model's vocabulary.
    """

    spot_px: int | None = 28
    niche_px: int | None = 224
    spot_um: float | None = None
    niche_um: float | None = None
    contexts_um: tuple[float, ...] = ()
    window: int | None = None
    counts: bool = True
    niche_counts: bool = True
    n_neighbors: int = 3
    include_self: bool = False
    ties: str = "index"
    centre: tuple[str, ...] = ()
    standardise: bool = False
    min_fraction: float = 0.2

    @property
    def image(self) -> bool:
        """Whether the model reads H&E."""
        return self.spot_px is not None or self.niche_px is not None

    @property
    def gene(self) -> bool:
        """Whether the model reads counts."""
        return self.counts or self.niche_counts

    @property
    def reads_niches(self) -> bool:
        """Whether the model reads the niche of a spot; one that reads windows alone needs no table of niches."""
        return self.niche_counts or self.niche_px is not None or self.window is None


class SlideInputs:
    """A slide made ready for one model: genes matched, niches found, tile sizes settled.

    Parameters
    ----------
    slide
        The slide; a modality that it lacks is left out of the batches.
    spec
        What the model wants.
    vocabulary
        Genes of the model; None for a model of H&E alone.
    slide_id
        Number of the slide among those that are read together.

    Raises
    ------
    InputError
        The slide has neither modality of the model, too few genes match, or a tile size is unknown.
    """

    def __init__(self, slide: Slide, spec: InputSpec, vocabulary: Vocabulary | None, *, slide_id: int = 0) -> None:
        self.slide = slide
        self.spec = spec
        self.slide_id = slide_id
        self.has_image = spec.image and slide.tiles is not None
        self.has_gene = spec.gene and slide.counts is not None and vocabulary is not None
        if not (self.has_image or self.has_gene):
            wanted = " or ".join(w for w, on in (("H&E", spec.image), ("counts", spec.gene)) if on)
            msg = (
                f"slide {slide.name!r} has none of what the model reads ({wanted}): "
                "give an image (image=, or sf.pp.tile) or raw counts (X or layer=)."
            )
            raise InputError(msg)
        self.match: GeneMatch | None = None
        if self.has_gene and slide.panel is not None and vocabulary is not None:
            self.match = match_genes(slide.panel, vocabulary, min_fraction=spec.min_fraction)
        #: features of a frozen encoder that stand in for tiles, float32 (n, f); set by ``inference.features``
        self.spot_features: NDArray[np.float32] | SideBySide | None = None
        self.niche_features: NDArray[np.float32] | SideBySide | None = None
        #: spots whose counts may be looked at, bool (n,); None: all
        self.measured: NDArray[np.bool_] | None = None
        self._moments: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        if self.has_image:
            self._check_sizes()

    @property
    def n_obs(self) -> int:
        """Number of spots."""
        return self.slide.n_obs

    def showing(self, size_um: float) -> SlideInputs:
        """Return the same with one spot tile of a size in µm in place of several."""
        other = copy(self)
        other.spec = replace(self.spec, spot_um=size_um, contexts_um=())
        return other

    def tile_um(self, level: str) -> float:
        """Return the side in µm of the ``"spot"`` or the ``"niche"`` tile."""
        slide, spec = self.slide, self.spec
        asked = spec.spot_um if level == "spot" else spec.niche_um
        size = asked if asked is not None else (slide.spot_um if level == "spot" else slide.niche_um)
        if size is None:
            msg = (
                f"slide {slide.name!r}: the {level} tile has no size in µm (no spot diameter or pitch is known). "
                f"Record one with sf.pp.tile(adata, {level}_um=...)."
            )
            raise InputError(msg)
        return float(size)

    @cached_property
    def niches(self) -> NicheTable:
        """The slide's own niche table, or one built as the model wants it."""
        if self.slide.niches is not None:
            return self.slide.niches
        spec = self.spec
        built = self.slide.with_niches(spec.n_neighbors, include_self=spec.include_self, ties=spec.ties)
        if built.niches is None:
            msg = f"slide {self.slide.name!r}: no niche table could be built."
            raise InputError(msg)
        return built.niches

    @cached_property
    def windows(self) -> NDArray[np.int32]:
        """The window of every spot, ``(n, spec.window)``, the spot itself first, -1 where there is none."""
        return window_table(self.slide.coords, self.spec.window or 1, name=f"slide {self.slide.name!r}")

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the spots at some positions of the slide, or the windows around them, as a batch of CPU tensors."""
        index = np.asarray(indices, dtype=np.int64)
        if self.spec.window is None:
            return self.spots(index)
        table = self.windows[index]
        there = table >= 0
        # A spot of several windows is read and encoded once.
        spots, place = np.unique(table[there], return_inverse=True)
        local = np.full(table.shape, -1, dtype=np.int64)
        local[there] = place
        return replace(self.spots(spots.astype(np.int64)), window=torch.from_numpy(local))

    def spots(self, index: NDArray[np.int64]) -> Batch:
        """Return the spots at some positions of the slide by themselves."""
        spot_features, spot_tiles = self.shown(index, "spot")
        niche_features, niche_tiles = self.shown(index, "niche")
        counts = self.expression(index) if self.has_gene and self.spec.counts else None
        niche_counts = self.niche_expression(index) if self.has_gene and self.spec.niche_counts else None
        totals = self.slide.counts.totals()[index] if counts is not None and self.slide.counts is not None else None
        niches = self.niches.index[index] if self.spec.reads_niches else None
        return Batch(
            spot_tiles=spot_tiles,
            niche_tiles=niche_tiles,
            spot_mpp=None if spot_tiles is None else self._mpp("spot", len(index)),
            niche_mpp=None if niche_tiles is None else self._mpp("niche", len(index)),
            spot_features=spot_features,
            niche_features=niche_features,
            counts=None if counts is None else torch.from_numpy(counts),
            niche_counts=None if niche_counts is None else torch.from_numpy(niche_counts),
            totals=None if totals is None else torch.from_numpy(np.asarray(totals, dtype=np.float32)),
            measured=None if counts is None or self.measured is None else torch.from_numpy(self.measured[index]),
            gene_mask=self._gene_mask(len(index)),
            xy_um=torch.from_numpy(self.slide.coords[index].astype(np.float32)),
            slide_id=torch.full((len(index),), self.slide_id, dtype=torch.int64),
            index=torch.from_numpy(index),
            niche_index=None if niches is None else torch.from_numpy(niches.astype(np.int64)),
        )

    def tiles(self, indices: NDArray[np.int64], level: str) -> NDArray[np.uint8]:
        """Return ``"spot"`` or ``"niche"`` tiles, uint8 ``(b, px, px, 3)``, or ``(b, c, px, px, 3)`` of c contexts."""
        px = self.spec.spot_px if level == "spot" else self.spec.niche_px
        if self.slide.tiles is None or px is None:
            msg = f"slide {self.slide.name!r}: the model or the slide has no {level} tiles."
            raise InputError(msg)
        reader: TileReader = self.slide.tiles
        if level == "spot" and self.spec.contexts_um:
            sizes = [reader.read(indices, size_um=size, size_px=px) for size in self.spec.contexts_um]
            return np.stack(sizes, axis=1)
        return reader.read(indices, size_um=self.tile_um(level), size_px=px)

    def tile_mpp(self, level: str) -> tuple[float, ...]:
        """Return the µm/px of the ``"spot"`` tiles, one of each context, or of the ``"niche"`` tile."""
        px = self.spec.spot_px if level == "spot" else self.spec.niche_px
        contexts = self.spec.contexts_um if level == "spot" else ()
        return tuple(size / (px or 1) for size in contexts or (self.tile_um(level),))

    def _mpp(self, level: str, n: int) -> torch.Tensor:
        """Return the same of n spots, float32 ``(n,)``, or ``(n, c)`` of c contexts."""
        each = torch.tensor(self.tile_mpp(level), dtype=torch.float32).expand(n, -1)
        return each if level == "spot" and self.spec.contexts_um else each[:, 0]

    def expression(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``log1p(1e4 c / sum c)`` on the vocabulary, float32 ``(b, G)``; the sum is over all measured genes.

        Where the model asks for it, the mean over the slide is subtracted; so it is of the niches.
        """
        dense = self._expression(indices)
        return dense - self._mean_expression if "gene" in self.spec.centre else dense

    def niche_expression(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the same of the mean counts of each spot's niche (ST-Align, eq. 2)."""
        dense = self._niche_expression(indices)
        return dense - self._mean_niche_expression if "gene" in self.spec.centre else dense

    def _expression(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        counts, totals = self._counts_of(indices)
        dense: NDArray[np.float32] = log_normalise(counts, totals).toarray()
        return dense

    def _niche_expression(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._on_vocabulary is not None and self.slide.counts is not None:
            counts, totals, table, rows = self._on_vocabulary, self.slide.counts.totals(), self.niches, indices
        else:
            counts, totals, table, rows = self._touched(indices)
        neighbours = table.index[rows]
        present = neighbours >= 0
        sums = np.where(present, totals[neighbours], 0.0).sum(axis=1)
        # A spot without neighbours is its own niche, in niche_mean as here.
        mean_total = np.where(present.any(axis=1), sums / np.maximum(present.sum(axis=1), 1), totals[rows])
        scaled: NDArray[np.float32] = log_normalise(niche_mean(counts, table, rows), mean_total)
        return scaled

    def _touched(
        self, indices: NDArray[np.int64]
    ) -> tuple[sparse.csr_matrix, NDArray[np.float32], NicheTable, NDArray[np.int64]]:
        """Read only the rows that some niches touch: counts, totals, their niche table, positions of ``indices``."""
        table = self.niches
        neighbours = table.index[indices]
        members = np.unique(np.concatenate([neighbours[neighbours >= 0].ravel(), indices]))
        counts, totals = self._counts_of(members)
        rows = np.searchsorted(members, indices)
        local = np.full((len(members), table.k), -1, dtype=np.int32)
        local[rows] = np.where(neighbours >= 0, np.searchsorted(members, neighbours), -1)
        return counts, totals, NicheTable(local, np.zeros(local.shape, dtype=np.float32)), rows

    @cached_property
    def _mean_expression(self) -> NDArray[np.float32]:
        return self._mean_of(self._expression)

    @cached_property
    def _mean_niche_expression(self) -> NDArray[np.float32]:
        return self._mean_of(self._niche_expression)

    def _mean_of(self, read: Callable[[NDArray[np.int64]], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the mean over the slide, read in blocks."""
        blocks = np.array_split(np.arange(self.n_obs), -(-self.n_obs // _BLOCK))
        total = sum(read(block).sum(axis=0, dtype=np.float64) for block in blocks)
        return np.asarray(total / self.n_obs, dtype=np.float32)

    def _counts_of(self, indices: NDArray[np.int64]) -> tuple[sparse.csr_matrix, NDArray[np.float32]]:
        if self.slide.counts is None or self.match is None:
            msg = f"slide {self.slide.name!r} has no counts."
            raise InputError(msg)
        if self._on_vocabulary is not None:
            return self._on_vocabulary[indices], self.slide.counts.totals()[indices]
        raw = self.slide.counts.rows(indices)
        return self.match.take(raw), np.asarray(raw.sum(axis=1), dtype=np.float32).ravel()

    @cached_property
    def _on_vocabulary(self) -> sparse.csr_matrix | None:
        """All counts on the vocabulary, kept for slides in memory."""
        if self.slide.counts is None or self.match is None or self.slide.counts.is_backed:
            return None
        return self.match.take(self.slide.counts.to_csr())

    def shown(self, index: NDArray[np.int64], level: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (features of a frozen encoder, None) where they were computed, else (None, tiles), else nothing."""
        features = self.spot_features if level == "spot" else self.niche_features
        px = self.spec.spot_px if level == "spot" else self.spec.niche_px
        if not self.has_image or px is None:
            return None, None
        if features is not None:
            chosen = np.ascontiguousarray(features[index])
            if "image" in self.spec.centre:
                mean, deviation = self._feature_moments(level)
                chosen = (chosen - mean) / deviation if self.spec.standardise else chosen - mean
            return torch.from_numpy(chosen), None
        tiles = self.tiles(index, level)
        return None, torch.from_numpy(tiles).movedim(-1, -3)

    def take_features(self, scaled: NDArray[np.float32]) -> None:
        """Put features that a model has scaled in the place of the spot's; the slide's mean is out of them already."""
        self.spot_features = scaled
        self.spec = replace(self.spec, centre=tuple(c for c in self.spec.centre if c != "image"), standardise=False)

    def _feature_moments(self, level: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return mean and deviation of a slide's features, 1 where a feature does not vary."""
        if level not in self._moments:
            features = self.spot_features if level == "spot" else self.niche_features
            if features is None:
                msg = f"slide {self.slide.name!r} has no {level} features to take the mean of."
                raise InputError(msg)
            mean = self._mean_of(features.__getitem__)
            deviation = np.sqrt(self._mean_of(lambda rows: np.square(features[rows] - mean)))
            flat = deviation <= 1e-6 * np.maximum(np.abs(mean), 1.0)
            self._moments[level] = (mean, np.where(flat, np.float32(1.0), deviation))
        return self._moments[level]

    @property
    def measured_genes(self) -> NDArray[np.bool_]:
        """Which genes of the vocabulary the slide measured, bool ``(G,)``."""
        if self.match is None:
            msg = f"slide {self.slide.name!r} has no counts."
            raise InputError(msg)
        return np.asarray(self.match.mask, dtype=bool)

    def _gene_mask(self, n: int) -> torch.Tensor | None:
        if self.match is None or self.match.n_matched == self.match.n_vocabulary:
            return None
        return torch.from_numpy(self.match.mask).expand(n, -1)

    def _check_sizes(self) -> None:
        for level, px in (("spot", self.spec.spot_px), ("niche", self.spec.niche_px)):
            if px is not None and not (level == "spot" and self.spec.contexts_um):
                self.tile_um(level)


class SideBySide:
    """Tables of features side by side, of which rows are read; tables on disk stay there.

    Parameters
    ----------
    parts
        Tables with the same rows.
    """

    def __init__(self, parts: Sequence[NDArray[np.float32]]) -> None:
        self.parts = list(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.parts[0]), sum(part.shape[1] for part in self.parts)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        return np.concatenate([part[index] for part in self.parts], axis=1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.float32]:  # noqa: FBT001 (NumPy's)
        return np.asarray(self[:], dtype=dtype)


def collate(parts: list[Batch]) -> Batch:
    """Join batches of several slides; what one of them lacks is left out of all, gene masks are filled in."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, torch.Tensor | None] = {}
    for name in Batch.__dataclass_fields__:
        tensors = [getattr(part, name) for part in parts]
        if name == "gene_mask":
            joined[name] = _join_masks(parts)
        elif name == "measured":
            joined[name] = _join_measured(parts)
        elif name == "niche_index":
            joined[name] = _join_padded(tensors)
        elif name == "window":
            starts = np.cumsum([0, *(part.n_rows for part in parts)])
            joined[name] = _join_padded([_shifted(t, int(n)) for t, n in zip(tensors, starts[:-1], strict=True)])
        elif all(t is not None for t in tensors):
            joined[name] = torch.cat(tensors)
        else:
            joined[name] = None
    return Batch(**joined)


def _shifted(window: torch.Tensor | None, start: int) -> torch.Tensor | None:
    """Let a window point to rows of the joined batch."""
    return None if window is None else torch.where(window >= 0, window + start, window)


def _join_masks(parts: list[Batch]) -> torch.Tensor | None:
    if all(part.gene_mask is None for part in parts):
        return None
    width = next(part.gene_mask.shape[1] for part in parts if part.gene_mask is not None)
    full = [torch.ones(p.n_rows, width, dtype=torch.bool) if p.gene_mask is None else p.gene_mask for p in parts]
    return torch.cat(full)


def _join_measured(parts: list[Batch]) -> torch.Tensor | None:
    if all(part.measured is None for part in parts):
        return None
    return torch.cat([torch.ones(p.n_rows, dtype=torch.bool) if p.measured is None else p.measured for p in parts])


def _join_padded(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Join tables of neighbours of different widths, padded with -1."""
    present = [t for t in tensors if t is not None]
    if len(present) < len(tensors):
        return None
    width = max(t.shape[1] for t in present)
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in present])
