"""AE-Gene of ST-Align (eq. 6): a Transformer encoder over tokens made of one expression vector."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm._validate import check_choice, check_count
from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene.scaling import GeneScaler
from stfm.nn.pooling import TokenPooling
from stfm.nn.principal import leading_components
from stfm.nn.transformer import TransformerEncoder

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec

TOKENS = ("chunks", "genes", "single")
SKIPS = ("none", "pca")
#: what the Transformer adds at the start, beside a skip that holds the components already
START_GAIN = 0.1


class ChunkTokens(nn.Module):
    """The vocabulary cut into equal chunks; each has a linear map of its own to a token."""

    def __init__(self, n_genes: int, n_chunks: int, width: int) -> None:
        super().__init__()
        self.n_chunks = min(n_chunks, n_genes)
        self.size = math.ceil(n_genes / self.n_chunks)
        self.weight = nn.Parameter(torch.randn(self.n_chunks, self.size, width) / math.sqrt(self.size))
        self.position = nn.Parameter(torch.randn(self.n_chunks, width) * 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens ``(b, n_chunks, width)`` and no padding."""
        x = nn.functional.pad(x, (0, self.n_chunks * self.size - x.shape[1])).unflatten(1, (self.n_chunks, self.size))
        return torch.einsum("bcs,csd->bcd", x, self.weight) + self.position, None


class GeneTokens(nn.Module):
    """A token a gene: the gene's embedding, plus its value along a learned direction.

    The genes with the largest absolute values of each spot are kept, since attention over a whole panel is slow.
    """

    def __init__(self, n_genes: int, max_genes: int, width: int) -> None:
        super().__init__()
        self.max_genes = min(max_genes, n_genes)
        self.gene = nn.Embedding(n_genes, width)
        self.value = nn.Linear(1, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens ``(b, max_genes, width)``, and True where there is none (genes without counts)."""
        chosen = x.abs().topk(self.max_genes, dim=1).indices
        values = x.gather(1, chosen)
        padding = values == 0
        padding[:, 0] = False  # a spot without counts keeps one token
        return self.gene(chosen) + self.value(values.unsqueeze(-1)), padding


class SingleToken(nn.Module):
    """The whole vector as one token."""

    def __init__(self, n_genes: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_genes, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens ``(b, 1, width)`` and no padding."""
        return self.linear(x).unsqueeze(1), None


class GeneTransformer(nn.Module):
    """Expression vector -> tokens -> Transformer encoder -> one vector.

    Parameters
    ----------
    n_genes, width, depth, heads, hidden, dropout
        Of the Transformer; the paper has depth 6, 8 heads, dropout 0.1.
    tokens
        How one vector becomes tokens, which the paper leaves open (table of open choices in the docs, row 11):
        ``"chunks"``, ``"genes"``, ``"single"``.
    n_tokens
        Number of chunks, or the most genes a spot.
    pooling
        As in :class:`TokenPooling`.
    norm_first
        Normalise before each part instead of after it.
    standardise
        Of the genes, as in :class:`GeneScaler`.
    skip
        ``"pca"``: a linear map beside the Transformer, trained with it, that starts as the principal components of the
        training slides; ``"none"``: the Transformer alone.
    skip_rank
        Components that the skip starts with.
    """

    def __init__(
        self,
        n_genes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
        tokens: str,
        n_tokens: int,
        pooling: str,
        norm_first: bool,
        standardise: str,
        skip: str,
        skip_rank: int,
    ) -> None:
        super().__init__()
        check_choice("tokens", tokens, TOKENS)
        check_choice("skip", skip, SKIPS)
        check_count("n_tokens", n_tokens)
        self.scaler = GeneScaler(n_genes, standardise)
        self.tokens: nn.Module
        if tokens == "chunks":
            self.tokens = ChunkTokens(n_genes, n_tokens, width)
        elif tokens == "genes":
            self.tokens = GeneTokens(n_genes, n_tokens, width)
        else:
            self.tokens = SingleToken(n_genes, width)
        self.cls = nn.Parameter(torch.randn(width) * 0.02) if pooling == "cls" else None
        self.encoder = TransformerEncoder(width, heads, hidden, depth, dropout=dropout, norm_first=norm_first)
        self.pooling = TokenPooling(pooling, width=width)
        self.skip = nn.Linear(n_genes, width, bias=False) if skip == "pca" else None
        self.skip_rank = min(skip_rank, width)
        self.gain = nn.Parameter(torch.tensor(START_GAIN)) if skip == "pca" else None

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the genes' scales from ``x``, ``(n, G)``, and the components that the skip starts with."""
        self.scaler.fit(x, mask)
        if self.skip is None or len(x) < 2:
            return
        z = self.scaler(x, mask)
        spread, directions = leading_components(z, min(self.skip_rank, *z.shape))
        generator = torch.Generator().manual_seed(0)
        rotation, _ = torch.linalg.qr(torch.randn(self.skip.out_features, len(directions), generator=generator))
        with torch.no_grad():
            self.skip.weight.copy_(rotation @ directions / spread[0].clamp_min(1e-6))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, width)``."""
        z = self.scaler(x, mask)
        tokens, padding = self.tokens(z)
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(len(x), 1, -1), tokens], dim=1)
            padding = None if padding is None else nn.functional.pad(padding, (1, 0), value=False)
        pooled: Tensor = self.pooling(self.encoder(tokens, padding), padding)
        if self.skip is None or self.gain is None:
            return pooled
        linear: Tensor = self.skip(z)
        return linear + self.gain * pooled


def gene_transformer(
    spec: EncoderSpec,
    *,
    n_genes: int,
    width: int = 512,
    depth: int = 6,
    heads: int = 8,
    hidden: int | None = None,
    dropout: float = 0.1,
    tokens: str = "chunks",
    n_tokens: int = 32,
    pooling: str = "mean",
    norm_first: bool = True,
    standardise: str = "zscore",
    skip: str = "none",
    skip_rank: int = 20,
) -> GeneEncoder:
    """Build the encoder; options as in :class:`GeneTransformer` (``hidden`` is four times the width)."""
    backbone = GeneTransformer(
        n_genes,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden or 4 * width,
        dropout=dropout,
        tokens=tokens,
        n_tokens=n_tokens,
        pooling=pooling,
        norm_first=norm_first,
        standardise=standardise,
        skip=skip,
        skip_rank=skip_rank,
    )
    return GeneEncoder(spec, backbone, width=width, n_genes=n_genes)
