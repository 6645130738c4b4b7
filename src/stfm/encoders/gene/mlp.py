"""Fully connected gene encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene.scaling import GeneScaler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


class GeneMLP(nn.Module):
    """Scaled genes through hidden layers to a vector; without hidden layers one linear map.

    Parameters
    ----------
    n_genes, width
        G and the width of the result.
    hidden
        Widths of the hidden layers.
    dropout
        On the genes and after every hidden layer.
    standardise
        As in :class:`GeneScaler`.
    """

    def __init__(self, n_genes: int, width: int, *, hidden: Sequence[int], dropout: float, standardise: str) -> None:
        super().__init__()
        self.scaler = GeneScaler(n_genes, standardise)
        layers: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
        in_width = n_genes
        for size in hidden:
            layers += [nn.Linear(in_width, size), nn.LayerNorm(size), nn.GELU(), nn.Dropout(dropout)]
            in_width = size
        layers.append(nn.Linear(in_width, width))
        self.layers = nn.Sequential(*layers)

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the genes' scales from ``x``, ``(n, G)``."""
        self.scaler.fit(x, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, width)``."""
        return self.layers(self.scaler(x, mask))  # type: ignore[no-any-return]


def gene_mlp(
    spec: EncoderSpec,
    *,
    n_genes: int,
    width: int = 128,
    hidden: Sequence[int] = (256,),
    dropout: float = 0.1,
    standardise: str = "zscore",
) -> GeneEncoder:
    """Build the encoder; options as in :class:`GeneMLP`."""
    backbone = GeneMLP(n_genes, width, hidden=hidden, dropout=dropout, standardise=standardise)
    return GeneEncoder(spec, backbone, width=width, n_genes=n_genes)
