"""scGPT: a Transformer over gene tokens, parameters named as in its published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice
from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene._tables import read_json, read_table, rows_of
from stfm.nn.transformer import TransformerEncoder

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec
    from stfm.slide.genes import Vocabulary

SPECIALS = ("<pad>", "<cls>", "<eoc>")
# Parts of a checkpoint that pretraining needs and embedding does not.
HEADS = (
    "decoder.", "cls_decoder.", "mvc_decoder.", "grad_reverse_discriminator.", "sim.", "creterion_cce.", "dsbn.", "bn.",
    "flag_encoder.", "batch_encoder.",
)  # fmt: skip
# Names under flash attention, in its two states, and PyTorch's.
RENAMED = {
    "self_attn._impl.Wqkv.": "self_attn.in_proj_",
    "self_attn.Wqkv.": "self_attn.in_proj_",
    "self_attn._impl.out_proj.": "self_attn.out_proj.",
}
KEPT = ("highest", "sample")


class GeneEmbedding(nn.Module):
    """Embedding of gene ids, normalised."""

    def __init__(self, n_ids: int, width: int, pad: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_ids, width, padding_idx=pad)
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        return self.enc_norm(self.embedding(ids))  # type: ignore[no-any-return]


class ValueEncoder(nn.Module):
    """Embedding of a binned value as a number (scGPT's "continuous" style)."""

    def __init__(self, width: int, dropout: float, largest: float = 512.0) -> None:
        super().__init__()
        self.largest = largest
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        x = values.unsqueeze(-1).clamp(max=self.largest)
        return self.dropout(self.norm(self.linear2(F.relu(self.linear1(x)))))  # type: ignore[no-any-return]


class ScGPT(nn.Module):
    """Cell embedding of scGPT: ``<cls>`` and the expressed genes with binned values, L2-normalised.

    Two steps differ from its code so that a spot has one embedding: which of more than ``max_length - 1`` expressed
    genes are kept does not change from call to call (there: a new random sample), and a value that several bins could
    hold goes to the uppermost (there: drawn).

    Parameters
    ----------
    n_genes
        G of the model that uses the encoder; :meth:`bind` finds each gene's id.
    vocab
        JSON file of symbols and ids (``vocab.json`` of a checkpoint). Without it ids are given in the order of the
        model's genes, which fits random weights only.
    n_ids
        Number of ids, special tokens included.
    width, depth, heads, hidden, dropout
        Of the Transformer.
    n_bins, max_length, pad_value
        Of the input.
    kept
        Genes that are kept where more are expressed than fit: ``"highest"``, or ``"sample"``, a random sample of them
        by an order of all genes that is drawn once.
    """

    gene_ids: Tensor
    special_ids: Tensor
    order: Tensor

    def __init__(
        self,
        n_genes: int,
        *,
        vocab: str | None,
        n_ids: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float,
        n_bins: int,
        max_length: int,
        pad_value: float,
        kept: str,
    ) -> None:
        super().__init__()
        check_choice("kept", kept, KEPT)
        if vocab is None and n_genes + len(SPECIALS) > n_ids:
            msg = f"{n_genes} genes do not fit in {n_ids} ids; give scGPT's vocabulary file (option 'vocab') or n_ids."
            raise InputError(msg)
        self.n_bins, self.max_length, self.pad_value = n_bins, max_length, pad_value
        self.vocab, self.kept = vocab, kept
        self.pad, self.cls = n_ids - len(SPECIALS), n_ids - len(SPECIALS) + 1
        self.encoder = GeneEmbedding(n_ids, width, self.pad)
        self.value_encoder = ValueEncoder(width, dropout)
        self.transformer_encoder = TransformerEncoder(
            width, heads, hidden, depth, dropout=dropout, norm_first=False, activation="relu"
        )
        self.register_buffer("gene_ids", torch.arange(n_genes))
        self.register_buffer("special_ids", torch.tensor([self.pad, self.cls]))
        order = torch.rand(n_genes, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("order", order.to(self.gene_ids.device), persistent=False)

    def bind(self, vocabulary: Vocabulary) -> None:
        """Look up the id of every gene of the model; genes that scGPT does not know are left out."""
        if self.vocab is None:
            return
        table = read_table(self.vocab)
        n_ids = self.encoder.embedding.num_embeddings
        # A table without special tokens gets them at its end, as scGPT's own code does.
        for name in SPECIALS:
            table.setdefault(name, len(table))
        ids = rows_of(vocabulary, table, source=self.vocab, n_rows=n_ids, option="n_ids")
        specials = [table[name] for name in SPECIALS[:2]]
        self.gene_ids.copy_(torch.tensor(ids))
        self.special_ids.copy_(torch.tensor(specials))

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint without its heads, flash-attention names as PyTorch's; gene ids stay our own."""
        out = {}
        for key, value in state.items():
            if key.startswith(HEADS):
                continue
            for theirs, ours in RENAMED.items():
                key = key.replace(theirs, ours)
            out[key] = value
        return {**out, "gene_ids": self.gene_ids, "special_ids": self.special_ids}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``(b, width)``, rows of length 1."""
        known = self.gene_ids >= 0
        x = x * known if mask is None else x * (known & mask)
        bins = bin_values(x, self.n_bins)
        n_kept = min(self.max_length - 1, x.shape[1], max(1, int((x > 0).sum(dim=1).max())))
        rank = x if self.kept == "highest" else torch.where(x > 0, self.order, -1.0)
        chosen = rank.topk(n_kept, dim=1).indices
        padding = x.gather(1, chosen) <= 0
        ids = self.gene_ids[chosen].masked_fill(padding, 0)
        ids = torch.where(padding, self.special_ids[0], ids)
        values = bins.gather(1, chosen).masked_fill(padding, self.pad_value)
        cls = self.special_ids[1].expand(len(x), 1)
        tokens = self.encoder(torch.cat([cls, ids], dim=1))
        tokens = tokens + self.value_encoder(F.pad(values, (1, 0), value=self.pad_value).to(tokens.dtype))
        out = self.transformer_encoder(tokens, F.pad(padding, (1, 0), value=False))
        return F.normalize(out[:, 0], dim=-1)


def bin_values(x: Tensor, n_bins: int) -> Tensor:
    """Return the bin of every value among the non-zero values of its row: 0 for zero, else 1 to ``n_bins - 1``.

    Edges are the quantiles of the row's non-zero values, so that depth does not matter.
    """
    n_genes = x.shape[1]
    # An edge that meets a value must not be off by rounding; Apple's GPUs have no 64 bits.
    exact = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    ordered = torch.where(exact > 0, exact, torch.inf).sort(dim=1).values  # non-zero values first, ascending
    last = ((x > 0).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    at = torch.from_numpy(np.linspace(0, 1, n_bins - 1)).to(exact) * last
    low, high = at.floor().long().clamp(max=n_genes - 1), torch.minimum(at.ceil().long(), last)
    lower, upper = ordered.gather(1, low), ordered.gather(1, high)
    edges = torch.where(torch.isfinite(upper), lower + (upper - lower) * (at - low), torch.inf)
    bins = torch.searchsorted(edges.contiguous(), exact.contiguous(), right=True)
    return torch.where(x > 0, bins, 0).to(x.dtype)


def scgpt_options(folder: str | Path) -> dict[str, Any]:
    """Return the options that a published model's folder asks for.

    Parameters
    ----------
    folder
        Folder with ``args.json`` and ``vocab.json`` (and ``best_model.pt``, the ``weights``).

    Raises
    ------
    MissingKeyError
        One of the two files is not there.
    """
    path = Path(folder).expanduser()
    args = read_json(path / "args.json")
    names = {"width": "embsize", "depth": "nlayers", "heads": "nheads", "hidden": "d_hid", "dropout": "dropout",
             "pad_value": "pad_value", "n_bins": "n_bins"}  # fmt: skip
    table = read_table(path / "vocab.json")
    n_ids = max([*table.values(), -1]) + 1 + sum(name not in table for name in SPECIALS)
    options = {option: args[key] for option, key in names.items() if key in args}
    return {"vocab": str(path / "vocab.json"), "n_ids": n_ids, **options}


def scgpt(
    spec: EncoderSpec,
    *,
    n_genes: int,
    vocab: str | None = None,
    n_ids: int = 60697,
    width: int = 512,
    depth: int = 12,
    heads: int = 8,
    hidden: int = 512,
    dropout: float = 0.2,
    n_bins: int = 51,
    max_length: int = 1200,
    pad_value: float = -2.0,
    kept: str = "highest",
) -> GeneEncoder:
    """Build scGPT's encoder; options as in :class:`ScGPT`."""
    backbone = ScGPT(
        n_genes,
        vocab=vocab,
        n_ids=n_ids,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        dropout=dropout,
        n_bins=n_bins,
        max_length=max_length,
        pad_value=pad_value,
        kept=kept,
    )
    return GeneEncoder(spec, backbone, width=width, n_genes=n_genes)
