"""Parts of the multi-branch STORM: what it reads of a batch, expression in and out, decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from stfm.encoders.gene.scaling import GeneScaler
from stfm.nn.multibranch import CrossStack, Stack

if TYPE_CHECKING:
    from stfm.models.storm_multibranch_config import StormMultiBranchConfig


class Tissue(NamedTuple):
    """A batch as the model sees it: tiles, and the sites (spots, bins, cells) that lie in them.

    Attributes
    ----------
    tiles
        H&E, uint8 or float in 0..1 ``(b, 3, px, px)``; None without image.
    counts
        ``log1p(1e4 c / sum c)`` of the sites, ``(b, s, G)``; the first site is the one that is embedded.
    xy_um
        Places of the sites from the corner of the tile, ``(b, s, 2)``, or ``(1, s, 2)`` where all tiles agree.
    present
        Which sites there are, bool ``(b, s)``.
    gene_mask
        Which genes were measured, bool ``(b, s, G)`` or ``(b, 1, G)``; None where all were.
    whole
        Whether all sites are there for certain, so that nobody has to look.
    """

    tiles: Tensor | None
    counts: Tensor | None
    xy_um: Tensor
    present: Tensor
    gene_mask: Tensor | None = None
    whole: bool = False


class Latent(NamedTuple):
    """What was encoded, in the order of the places.

    Attributes
    ----------
    x
        ``(b, t, d)``.
    hidden
        Places that were not encoded, bool ``(b, t)``, or None.
    start
        What a decoder of self-attention starts from: ``x``, and at hidden places the other modality's token there.
    absent
        Places where there is no site, bool ``(b, t)``, or None.
    xy_um
        The places, ``(b, t, 2)`` or ``(1, t, 2)``.
    """

    x: Tensor
    hidden: Tensor | None
    start: Tensor
    absent: Tensor | None
    xy_um: Tensor


class ExpressionEmbedding(nn.Module):
    """Genes on one scale, mapped to few numbers a site; these to tokens.

    Parameters
    ----------
    n_genes, gene_width
        G, and the numbers that they are mapped to (a 1 x 1 convolution over the image of bins).
    cells
        Bins along the side of a patch; 1 where a site is a token.
    width
        Width of a token.
    standardise
        As in :class:`~stfm.encoders.gene.scaling.GeneScaler`.
    """

    def __init__(self, n_genes: int, gene_width: int, cells: int, width: int, *, standardise: str) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.scaler = GeneScaler(n_genes, standardise)
        self.genes = nn.Linear(n_genes, gene_width)
        self.patch = nn.Linear(cells * cells * gene_width, width)

    @property
    def needs_fit(self) -> bool:
        """Whether the scale of the genes is taken from the training slides."""
        return self.scaler.standardise != "none"

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the genes' scales from ``x``, ``(n, G)``."""
        self.scaler.fit(x, mask)

    def scaled(self, counts: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``(b, s, G)`` on one scale, 0 where a gene was not measured."""
        return cast("Tensor", self.scaler(counts, mask))

    def unscaled(self, z: Tensor) -> Tensor:
        """Return ``log1p(1e4 c / sum c)`` from what :meth:`scaled` returned."""
        return z if not self.needs_fit else z * self.scaler.scale + self.scaler.mean


class Decoder(nn.Module):
    """Predicts one modality where only the other one was shown.

    Parameters
    ----------
    config
        Kind, depth and widths.
    out
        Numbers a token is mapped to.
    n_genes
        G, for the decoder of expression: maps ``gene_width`` numbers of a site to its genes.
    """

    def __init__(self, config: StormMultiBranchConfig, out: int, n_genes: int | None = None) -> None:
        super().__init__()
        hidden = round(config.mlp_ratio * config.width)
        kind = Stack if config.decoder == "self" else CrossStack
        self.stack = kind(
            config.width,
            config.heads,
            hidden,
            config.decoder_depth,
            bias_hidden=config.bias_hidden,
            checkpointing=config.checkpointing,
        )
        self.out = nn.Linear(config.width, out)
        self.genes = None if n_genes is None else nn.Linear(config.gene_width, n_genes)

    def forward(self, latent: Latent, positions: Tensor) -> Tensor:
        """Return ``(b, t, out)`` at all places; ``positions`` are those of the places."""
        if isinstance(self.stack, Stack):
            x = self.stack(latent.start, latent.xy_um, padding=latent.absent)
        else:
            x = self.stack(latent.x, positions, latent.xy_um, padding=latent.hidden)
        return cast("Tensor", self.out(x))


def sites_of_bins(counts: Tensor, extent_um: float) -> tuple[Tensor, Tensor]:
    """Return an image of bins ``(b, n, n, G)`` as sites: counts ``(b, n * n, G)`` and places ``(1, n * n, 2)``."""
    from stfm.nn.positions import grid_centres

    centres = grid_centres(counts.shape[1], extent_um).to(counts.device)
    return counts.flatten(1, 2), centres[None]


def mean_where(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of ``values`` ``(b, n, d)`` under each row of ``weights`` ``(b, m, n)``, 0 under an empty one."""
    weights = weights.to(values.dtype)
    return weights @ values / weights.sum(dim=2, keepdim=True).clamp_min(1)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return rows ``index`` ``(b, k)`` of ``values`` ``(b, n, d)`` (or ``(1, n, d)``)."""
    values = values.expand(len(index), -1, -1)
    return torch.gather(values, 1, index[:, :, None].expand(-1, -1, values.shape[2]))
