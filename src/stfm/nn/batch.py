"""What a model is fed with: one frozen bundle of tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from torch import Tensor

from stfm._errors import MissingKeyError

if TYPE_CHECKING:
    import torch

_IMAGE = ("spot_tiles", "niche_tiles", "spot_features", "niche_features")
_SCALE = ("spot_mpp", "niche_mpp")
_GENE = ("counts", "niche_counts", "totals", "measured", "gene_mask")


@dataclass(frozen=True)
class Batch:
    """A batch of spots; a modality that was not measured is None.

    Where a model reads windows, the rows are all the spots of these windows, each once, and ``window`` says which rows
    make up which window.

    Attributes
    ----------
    spot_tiles, niche_tiles
        H&E around the spot and around its niche, uint8 ``(b, 3, h, w)``; of several sizes ``(b, c, 3, h, w)``.
    spot_mpp, niche_mpp
        µm/px of the tiles, float32 ``(b,)``; of several sizes ``(b, c)``.
    spot_features, niche_features
        Features of a frozen image encoder, float32 ``(b, f)``; they stand in for the tiles.
    counts
        ``log1p(1e4 c / sum c)`` on the model's vocabulary, float32 ``(b, G)``.
    niche_counts
        The same of the niche's mean counts (ST-Align, eq. 2), float32 ``(b, G)``.
    totals
        Counts of the spot over all measured genes, float32 ``(b,)``.
    measured
        Whether the counts of a spot may be looked at, bool ``(b,)``; None where all may.
    gene_mask
        Which genes were measured, bool ``(b, G)``; None where all were.
    xy_um
        Coordinates, float32 ``(b, 2)`` or ``(b, 3)``.
    slide_id
        Number of the slide, int64 ``(b,)``.
    index
        Position of the spot in its slide, int64 ``(b,)``.
    niche_index
        Positions of the spot's neighbours in its slide, int64 ``(b, k)``, -1 where there are fewer.
    window
        Rows of the batch that lie in each window, its middle first, int64 ``(n_windows, w)``, -1 where there is none.
    """

    spot_tiles: Tensor | None = None
    niche_tiles: Tensor | None = None
    spot_mpp: Tensor | None = None
    niche_mpp: Tensor | None = None
    spot_features: Tensor | None = None
    niche_features: Tensor | None = None
    counts: Tensor | None = None
    niche_counts: Tensor | None = None
    totals: Tensor | None = None
    measured: Tensor | None = None
    gene_mask: Tensor | None = None
    xy_um: Tensor | None = None
    slide_id: Tensor | None = None
    index: Tensor | None = None
    niche_index: Tensor | None = None
    window: Tensor | None = None

    def __len__(self) -> int:
        return self.n_rows if self.window is None else len(self.window)

    @property
    def n_rows(self) -> int:
        """Number of different spots; more than its length where the batch holds windows."""
        return next((len(t) for t in self.tensors().values()), 0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: tensor for name, tensor in pairs if tensor is not None}

    @property
    def has_image(self) -> bool:
        """Whether H&E (or features of it) is there."""
        return any(getattr(self, name) is not None for name in _IMAGE)

    @property
    def has_gene(self) -> bool:
        """Whether counts are there."""
        return self.counts is not None or self.niche_counts is not None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in self.tensors().items()})

    def take(self, index: Tensor) -> Batch:
        """Return some spots of the batch, or some of its windows."""
        if self.window is not None:
            return replace(self, window=self.window[index])
        return replace(self, **{k: v[index] for k, v in self.tensors().items()})

    def without(self, *modalities: str) -> Batch:
        """Return the batch without ``"image"`` or ``"gene"``."""
        groups = {"image": (*_IMAGE, *_SCALE), "gene": _GENE}
        for modality in modalities:
            if modality not in groups:
                msg = f"modalities are 'image' and 'gene', got {modality!r}."
                raise MissingKeyError(msg)
        return replace(self, **{name: None for m in modalities for name in groups[m]})
