"""Genes in groups, learned or by pathway, to a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_count
from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene.scaling import GeneScaler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stfm.encoders.spec import EncoderSpec
    from stfm.slide.genes import Vocabulary


class GeneGroups(nn.Module):
    """One number a group, then a small network.

    A group's number is the weighted sum of its genes' standardised expression over the root of the sum of squared
    weights of those that were measured, so that it has one scale on any panel.

    Parameters
    ----------
    n_genes, width
        G and the width of the result.
    n_groups
        Groups that are learned: every gene has a share in each (a softmax over the groups).
    pathways
        Names of groups and their genes, instead; a gene may lie in several or in none.
    """

    members: Tensor

    def __init__(
        self, n_genes: int, width: int, *, n_groups: int, pathways: Mapping[str, Sequence[str]] | None
    ) -> None:
        super().__init__()
        self.pathways = None if pathways is None else {str(k): [str(g) for g in v] for k, v in pathways.items()}
        if self.pathways is not None and not self.pathways:
            msg = "pathways is empty; name at least one group with its genes, or leave it out to learn groups."
            raise InputError(msg)
        check_count("n_groups", n_groups)
        count = n_groups if self.pathways is None else len(self.pathways)
        self.scaler = GeneScaler(n_genes)
        if self.pathways is None:
            self.shares = nn.Parameter(torch.randn(n_genes, count))
        else:
            self.register_buffer("members", torch.zeros(n_genes, count))
        self.layers = nn.Sequential(nn.Linear(count, width), nn.GELU(), nn.Linear(width, width))

    def bind(self, vocabulary: Vocabulary) -> None:
        """Find the genes of the pathways among those of the model."""
        if self.pathways is None:
            return
        place = {str(name).upper(): i for i, name in enumerate(vocabulary.names)}
        self.members.zero_()
        for k, genes in enumerate(self.pathways.values()):
            found = [place[gene.upper()] for gene in genes if gene.upper() in place]
            self.members[found, k] = 1.0
        if not bool(self.members.any()):
            msg = "none of the model's genes lies in a pathway; are the pathways of another species?"
            raise InputError(msg)

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the genes' scales from ``x``, ``(n, G)``."""
        self.scaler.fit(x, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, width)``."""
        weight = self.members if self.pathways is not None else self.shares.softmax(dim=1)
        measured = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        size = (measured @ weight.square()).clamp_min(1e-6).sqrt()
        return self.layers((self.scaler(x, mask) @ weight) / size)  # type: ignore[no-any-return]


def gene_groups(
    spec: EncoderSpec,
    *,
    n_genes: int,
    width: int = 64,
    n_groups: int = 64,
    pathways: Mapping[str, Sequence[str]] | None = None,
) -> GeneEncoder:
    """Build the encoder; options as in :class:`GeneGroups`."""
    backbone = GeneGroups(n_genes, width, n_groups=n_groups, pathways=pathways)
    return GeneEncoder(spec, backbone, width=width, n_genes=n_genes)
