"""What the slides that STORM was adapted to say of themselves, beside what pretraining knew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm.models._storm_field import LatentField
from stfm.nn.gene_table import GeneTable, expected_latent

if TYPE_CHECKING:
    from stfm.models._storm_fit import Sample
    from stfm.models._storm_spatial import Windows
    from stfm.nn.batch import Batch

__all__ = ["OwnComponents", "fit_own"]

_WIDTH = 16
#: most variable genes that are read, among those detected in this share of the spots
_GENES, _DETECTED = 2000, 0.1
#: size of what pretraining knew in the joint embedding; that of the slides' own components is 1
_KNOWN = 0.3
_RIDGE = 0.1


class OwnComponents(nn.Module):
    """Components in which neighbours on the slides themselves are alike, as a field over the tissue.

    They are found in closed form (:func:`~stfm.nn.principal.shared_components`) and do not train. Spots without counts
    get what a linear map tells of them from the latent expression of the model.

    Parameters
    ----------
    n_genes
        Number of genes that are read.
    latent
        Length of the model's latent expression.
    """

    genes: Tensor
    mean: Tensor
    scale: Tensor
    embedding: Tensor
    noise: Tensor
    told: Tensor
    known: Tensor

    def __init__(self, n_genes: int, latent: int) -> None:
        super().__init__()
        self.register_buffer("genes", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))
        self.register_buffer("embedding", torch.zeros(n_genes, _WIDTH))
        self.register_buffer("noise", torch.ones(()))
        self.register_buffer("told", torch.zeros(latent, _WIDTH))
        # What the latent expression of pretraining is multiplied by.
        self.register_buffer("known", torch.ones(()))
        self.field = LatentField(_WIDTH)

    def read(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the components of spots, ``(n, w)``, from log-normalised expression on the vocabulary ``(n, G)``."""
        return expected_latent(
            x[:, self.genes], self.mean, self.scale, self.embedding, self.noise,
            None if mask is None else mask[:, self.genes],
        )  # fmt: skip

    def forward(self, latent: Tensor, batch: Batch, windows: Windows, written: Tensor) -> Tensor:
        """Return the joint embedding: the slides' own components, then the latent expression, ``(b, w + e)``.

        Parameters
        ----------
        latent
            Latent expression of each window's middle, as large as its components are in expression, ``(b, e)``.
        batch, windows
            What the model reads.
        written
            Latent expression that H&E tells, ``(b, e)``.
        """
        own = written @ self.told
        if "gene" in windows.tokens and batch.counts is not None:
            read = self.read(batch.counts.float(), batch.gene_mask)
            shared = self.field(read[windows.rows], windows.xy_um, windows.gene)
            own = torch.where(windows.gene.any(dim=1, keepdim=True), shared, own)
        return torch.cat([self.embedding.norm(dim=0) * own, self.known * latent], dim=-1)


@torch.no_grad()
def fit_own(table: GeneTable, sample: Sample) -> OwnComponents | None:
    """Return the own components of slides; None where they have too few genes for any.

    Parameters
    ----------
    table
        Gene table of the model.
    sample
        Patches of the slides.
    """
    genes = _variable_genes(sample)
    if len(genes) <= _WIDTH:
        return None
    own = OwnComponents(len(genes), table.width)
    fitted = GeneTable(len(genes), _WIDTH, likelihood="gaussian")
    mask = None if sample.mask is None else sample.mask[:, genes]
    fitted.fit(sample.x[:, genes], sample.totals, mask, groups=sample.slide, graph=sample.graph())
    own.genes.copy_(genes)
    for name in ("mean", "scale", "embedding", "noise"):
        getattr(own, name).copy_(getattr(fitted, name))
    device = table.embedding.device
    read, latent = own.read(sample.x, sample.mask), table.cpu().read(sample.x, sample.mask)
    shared = []
    for values, sizes, field in (
        (read, own.embedding.norm(dim=0), own.field),
        (latent, table.embedding.norm(dim=0), LatentField(table.width)),
    ):
        field.fit([part.numpy() for part in values.split([len(c) for c in sample.coords])], sample.coords)
        shared.append((sizes.square() * field.sill).sum())
    own.known.copy_(_KNOWN * (shared[0] / shared[1].clamp_min(1e-12)).sqrt())
    system = latent.T @ latent + _RIDGE * len(latent) * torch.eye(table.width)
    own.told.copy_(torch.linalg.solve(system, latent.T @ read))
    table.to(device)
    return own.to(device)


def _variable_genes(sample: Sample) -> Tensor:
    """Return the genes that vary most within slides, in order of the vocabulary."""
    there = torch.ones_like(sample.x, dtype=torch.bool) if sample.mask is None else sample.mask
    n = there.sum(dim=0).clamp_min(1)
    variance = torch.zeros(sample.x.shape[1])
    for group in sample.slide.unique():
        rows = sample.slide == group
        variance += (sample.x[rows] - sample.x[rows].mean(dim=0)).mul_(there[rows]).square().sum(dim=0) / n
    detected = (sample.x > 0).sum(dim=0) >= _DETECTED * n
    variance = torch.where(detected & (variance > 0), variance, -1.0)
    chosen = variance.topk(min(_GENES, len(variance))).indices
    return chosen[variance[chosen] > 0].sort().values
