"""scFoundation's encoder (xTrimoGene): a Transformer over expressed genes whose values choose their own bins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import DataIntegrityError, InputError
from stfm._validate import check_choice
from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene._tables import read_table, rows_of
from stfm.nn.transformer import TransformerLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stfm.encoders.spec import EncoderSpec
    from stfm.slide.genes import Vocabulary

POOLINGS = ("all", "max")
VERSIONS = ("cell", "rde", "gene")
#: parts of the published file that the cell embedding does not use
DECODER = ("decoder.", "decoder_embed.", "norm.", "to_final.")
TARGET_SUM = 1e4


class AutoBins(nn.Module):
    """A value as a soft choice of bins: weights over the bins by two layers, then the mean of their embeddings.

    ``emb_mask`` and ``emb_pad`` belong to the published layout; an encoder that masks nothing does not read them.
    """

    def __init__(self, width: int, n_bins: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.mlp = nn.Linear(1, n_bins)
        self.mlp2 = nn.Linear(n_bins, n_bins)
        self.emb = nn.Embedding(n_bins, width)
        self.emb_mask = nn.Embedding(1, width)
        self.emb_pad = nn.Embedding(1, width)

    def forward(self, values: Tensor) -> Tensor:
        """Return ``(b, t, d)`` from ``(b, t)``."""
        hidden = F.leaky_relu(self.mlp(values.unsqueeze(-1)), 0.1)
        weight = (self.alpha * hidden + self.mlp2(hidden)).softmax(dim=-1)
        return weight @ self.emb.weight  # type: ignore[no-any-return]


class Layers(nn.Module):
    """Transformer layers that normalise after each part (ReLU), and a last normalisation."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.transformer_encoder = nn.ModuleList(
            TransformerLayer(width, heads, 4 * width, dropout=dropout, norm_first=False, activation="relu")
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Return ``(b, t, d)``; ``padding`` is True where there is no token."""
        for layer in self.transformer_encoder:
            x = layer(x, padding)
        return self.norm(x)  # type: ignore[no-any-return]


class ScFoundation(nn.Module):
    """Cell embedding of scFoundation.

    Its code reads counts on exactly the genes of its table (those that were not measured as zeros), normalised to
    1e4 over these, and appends two tokens: T, the depth that is aimed at, and S, that of the cell. Here expression
    comes normalised over all measured genes and is normalised again over the genes of the table, which gives the same
    values; the depth is no longer known, so that S is log10 of the sum of the normalised values, as its code does for
    data that come normalised.

    Parameters
    ----------
    n_genes
        G of the model that uses the encoder; :meth:`bind` finds each gene's place.
    genes
        The published gene index, a table with a column ``gene_name`` in order. Without it places are given in the
        order of the model's genes, which fits random weights only.
    n_table
        Genes of that table; T and S follow them.
    width, depth, heads, dropout, n_bins, alpha
        Of the network; ``alpha`` is its ``bin_alpha``.
    pooling
        ``"all"``: S, T, the largest and the mean value over the genes, side by side; ``"max"``: the largest over all
        tokens.
    version
        Which of the weights in ``models.ckpt``: ``"cell"``, ``"rde"`` (trained to raise the depth) or ``"gene"``.
    target
        T, log10 of counts.
    depth_token
        S, log10 of counts; None takes it from the values as said above.
    max_genes
        Keep only so many of the highest genes of a spot; None keeps every expressed one, as the published code does.
    """

    positions: Tensor

    def __init__(
        self,
        n_genes: int,
        *,
        genes: str | None,
        n_table: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float,
        n_bins: int,
        alpha: float,
        pooling: str,
        version: str,
        target: float,
        depth_token: float | None,
        max_genes: int | None,
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, POOLINGS)
        check_choice("version", version, VERSIONS)
        if genes is None and n_genes > n_table:
            msg = f"{n_genes} genes do not fit in {n_table} places; give scFoundation's gene index (option 'genes')."
            raise InputError(msg)
        self.genes, self.n_table, self.pooling, self.version = genes, n_table, pooling, version
        self.target, self.depth_token, self.max_genes = target, depth_token, max_genes
        self.token_emb = AutoBins(width, n_bins, alpha)
        self.pos_emb = nn.Embedding(n_table + 3, width)  # the genes, T, S, and one for padding
        self.encoder = Layers(width, depth, heads, dropout)
        places = torch.arange(n_genes)
        self.register_buffer("positions", torch.where(places < n_table, places, -1))

    def bind(self, vocabulary: Vocabulary) -> None:
        """Find the place of every gene of the model; genes that are not in the table are left out."""
        if self.genes is None:
            return
        table = read_table(self.genes)
        rows = rows_of(vocabulary, table, source=self.genes, n_rows=self.n_table, option="n_table")
        self.positions.copy_(torch.tensor(rows))

    def convert_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the encoder's part of a published file.

        ``models.ckpt`` holds one entry a version, each with ``state_dict``; a key is what follows ``model.`` in it.
        The decoder (``decoder.``, ``decoder_embed.``, ``norm.``, ``to_final.``) is dropped.
        """
        if any(name in state for name in VERSIONS):
            if self.version not in state:
                msg = f"the file holds weights {', '.join(state)}, and version={self.version!r} was asked for."
                raise DataIntegrityError(msg)
            state = state[self.version]
        state = state.get("state_dict", state)
        out = {}
        for key, value in state.items():
            name = key.partition("model.")[2] or key
            if not name.startswith(DECODER):
                out[name] = value
        return {**out, "positions": self.positions}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, width)``, four times the width of a token with ``pooling="all"``."""
        values, places, padding = self.tokens(x, mask)
        embedded = self.token_emb(values) + self.pos_emb(places)
        out = self.encoder(embedded, padding)
        if self.pooling == "max":
            return out.masked_fill(padding[..., None], -torch.inf).amax(dim=1)  # type: ignore[no-any-return]
        genes, without = out[:, :-2], padding[:, :-2, None]
        empty = without.all(dim=1)
        largest = genes.masked_fill(without, -torch.inf).amax(dim=1).masked_fill(empty, 0.0)
        n_genes = (~without).sum(dim=1).clamp_min(1)
        mean = genes.masked_fill(without, 0.0).sum(dim=1) / n_genes
        return torch.cat([out[:, -1], out[:, -2], largest, mean], dim=1)

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, places and padding ``(b, t)`` of the expressed genes, then of T and S."""
        known = self.positions >= 0
        linear = torch.expm1(x * known if mask is None else x * (known & mask))
        total = linear.sum(dim=1, keepdim=True).clamp_min(1e-12)
        values = torch.log1p(linear / total * TARGET_SUM)
        n_kept = min(max(1, int((values > 0).sum(dim=1).max())), self.max_genes or values.shape[1])
        top = values.topk(n_kept, dim=1)
        padding = top.values <= 0
        depth = values.sum(dim=1).clamp_min(1.0).log10()
        if self.depth_token is not None:
            depth = torch.full_like(depth, self.depth_token)
        values = torch.cat([top.values, torch.full_like(depth, self.target)[:, None], depth[:, None]], dim=1)
        places = self.positions[top.indices].masked_fill(padding, self.n_table + 2)
        extra = self.positions.new_tensor([self.n_table, self.n_table + 1]).expand(len(x), 2)
        return values, torch.cat([places, extra], dim=1), F.pad(padding, (0, 2), value=False)


def scfoundation(
    spec: EncoderSpec,
    *,
    n_genes: int,
    genes: str | None = None,
    n_table: int = 19264,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.1,
    n_bins: int = 100,
    alpha: float = 1.0,
    pooling: str = "all",
    version: str = "cell",
    target: float = 4.0,
    depth_token: float | None = None,
    max_genes: int | None = None,
) -> GeneEncoder:
    """Build scFoundation's encoder; options as in :class:`ScFoundation`."""
    backbone = ScFoundation(
        n_genes,
        genes=genes,
        n_table=n_table,
        width=width,
        depth=depth,
        heads=heads,
        dropout=dropout,
        n_bins=n_bins,
        alpha=alpha,
        pooling=pooling,
        version=version,
        target=target,
        depth_token=depth_token,
        max_genes=max_genes,
    )
    return GeneEncoder(spec, backbone, width=4 * width if pooling == "all" else width, n_genes=n_genes)
