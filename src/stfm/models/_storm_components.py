"""What the slides that STORM was adapted to say of themselves, beside what pretraining knew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm.models._storm_field import LatentField
from stfm.nn.gene_table import GeneTable, expected_latent

if TYPE_CHECKING:
    from stfm.models._sample import Sample
    from stfm.models._storm_spatial import Windows
    from stfm.nn.batch import Batch

__all__ = ["SlideComponents", "fit_components"]

#: most variable genes that are read, among those detected in this share of the spots
_GENES, _DETECTED = 2000, 0.1
#: size of what pretraining knew in the joint embedding; that of the slides' own components is 1
_KNOWN = 0.3
#: of the map from latent expression, as a share of its variance, which is near 1
_RIDGE = 0.1


class SlideComponents(nn.Module):
    """Components in which neighbours on the slides themselves are alike, as a field over the tissue.

    They are found in closed form (:func:`~stfm.nn.principal.shared_components`) and do not train. Spots without counts
    get what a linear map tells of them from the latent expression of the model.

    Parameters
    ----------
    n_genes
        Number of genes that are read.
    latent
        Length e of the model's latent expression.
    width
        Number w of components.

    Attributes
    ----------
    genes
        Places of the genes in the vocabulary, int64 ``(g,)``.
    mean, scale, embedding, noise
        As of :class:`~stfm.nn.gene_table.GeneTable`, of these genes.
    told
        Map from the latent expression of the model, ``(e, w)``.
    latent_size
        What the latent expression is multiplied by in the joint embedding, a scalar.
    field
        How far each component reaches.
    """

    genes: Tensor
    mean: Tensor
    scale: Tensor
    embedding: Tensor
    noise: Tensor
    told: Tensor
    latent_size: Tensor

    def __init__(self, n_genes: int, latent: int, width: int) -> None:
        super().__init__()
        self.register_buffer("genes", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))
        self.register_buffer("embedding", torch.zeros(n_genes, width))
        self.register_buffer("noise", torch.ones(()))
        self.register_buffer("told", torch.zeros(latent, width))
        self.register_buffer("latent_size", torch.ones(()))
        self.field = LatentField(width)

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
            measured = windows.gene
            if batch.gene_mask is not None:  # of a panel without any of these genes nothing is read
                measured = measured & batch.gene_mask[:, self.genes].any(dim=1)[windows.rows]
            shared = self.field(read[windows.rows], windows.xy_um, measured)
            own = torch.where(measured.any(dim=1, keepdim=True), shared, own)
        return torch.cat([self.embedding.norm(dim=0) * own, self.latent_size * latent], dim=-1)


@torch.no_grad()
def fit_components(table: GeneTable, sample: Sample, width: int) -> SlideComponents | None:
    """Return the components of slides; None where no more genes vary on them than components were asked for.

    Parameters
    ----------
    table
        Gene table of the model; it is only looked at.
    sample
        Patches of the slides.
    width
        Number of components.
    """
    genes = _variable_genes(sample)
    if len(genes) <= width:
        return None
    found = SlideComponents(len(genes), table.width, width)
    with torch.random.fork_rng(devices=[]):  # its first weights, which are drawn, are all replaced
        fitted = GeneTable(len(genes), width, likelihood="gaussian")
    mask = None if sample.mask is None else sample.mask[:, genes]
    fitted.fit(sample.x[:, genes], sample.totals, mask, groups=sample.slide, graph=sample.graph())
    found.genes.copy_(genes)
    for name in ("mean", "scale", "embedding", "noise"):
        getattr(found, name).copy_(getattr(fitted, name))
    device = table.embedding.device
    table.cpu()
    latent, read = table.read(sample.x, sample.mask), found.read(sample.x, sample.mask)
    size = _fitted_size(found.field, read, found.embedding, sample)
    known = _fitted_size(LatentField(table.width), latent, table.embedding, sample)
    found.latent_size.copy_(_KNOWN * size / known.clamp_min(1e-6))
    system = latent.T @ latent + _RIDGE * len(latent) * torch.eye(table.width)
    found.told.copy_(torch.linalg.solve(system, latent.T @ read))
    table.to(device)
    return found.to(device)


def _fitted_size(field: LatentField, latent: Tensor, embedding: Tensor, sample: Sample) -> Tensor:
    """Fit a field to latent components and return the deviation, in expression, of what it tells of them."""
    field.fit([part.numpy() for part in latent.split([len(places) for places in sample.coords])], sample.coords)
    return (embedding.square().sum(dim=0) * field.sill).sum().sqrt()


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
