"""Novae: cells as weighted sums of gene embeddings; niches as graphs of them. Names as in its published checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import DataIntegrityError, InputError
from stfm.encoders.base import GeneEncoder
from stfm.encoders.gene._tables import read_json, read_table, rows_of
from stfm.encoders.gene.novae_graph import GraphEncoder
from stfm.encoders.gene.scaling import masked_moments

if TYPE_CHECKING:
    from stfm.encoders.gene.novae_graph import NicheGraphs
    from stfm.encoders.spec import EncoderSpec
    from stfm.slide.genes import Vocabulary

#: what training left in a checkpoint and embedding does not read
LEFTOVERS = ("swav_head.queue", "swav_head._kmeans_prototypes", "augmentation.")


class CellEmbedder(nn.Module):
    """Embeddings of genes and the linear map that follows them."""

    def __init__(self, n_rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_rows, width)
        self.linear = nn.Linear(width, width)


class _Prototypes(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self._prototypes = nn.Parameter(F.normalize(torch.randn(count, width) / math.sqrt(width), dim=1))

    def forward(self, z: Tensor) -> Tensor:
        """Return cosines ``(m, count)``."""
        return F.normalize(z, dim=1) @ self._prototypes.T


class Novae(nn.Module):
    """Novae's network.

    A slot of a model reads one spot at a time, so what it gets is the cell embedding: standardised expression times
    gene embeddings, whose columns have length 1 over the genes that were measured (100 numbers). The 64 numbers of a
    niche need the neighbours and their distances; :meth:`niches` gives them.

    Novae standardises each slide by itself, on values normalised to the slide's median depth. Here the statistics are
    taken once from the training slides (:meth:`fit`), as for every other encoder, on values normalised to 1e4.

    Parameters
    ----------
    n_genes
        G of the model that uses the encoder; :meth:`bind` finds each gene's row.
    genes
        ``config.json`` of a published model, or another table of its genes in order. Without it rows are given in the
        order of the model's genes, which fits random weights only.
    n_rows
        Genes that the embedding has; None: G.
    width
        Width of a gene's embedding.
    hidden, depth, heads, out_width, prototypes, histology
        Of the graph network, see :class:`~stfm.encoders.gene.novae_graph.GraphEncoder`; ``histology=0`` for checkpoints
        without the part that reads H&E.
    """

    gene_rows: Tensor
    mean: Tensor
    gain: Tensor

    def __init__(
        self,
        n_genes: int,
        *,
        genes: str | None,
        n_rows: int | None,
        width: int,
        hidden: int,
        depth: int,
        heads: int,
        out_width: int,
        prototypes: int,
        histology: int,
    ) -> None:
        super().__init__()
        self.n_rows = n_genes if n_rows is None else n_rows
        if genes is None and n_genes > self.n_rows:
            msg = f"{n_genes} genes do not fit in {n_rows} rows; give Novae's config.json (option 'genes') or n_rows."
            raise InputError(msg)
        self.genes = genes
        self.cell_embedder = CellEmbedder(self.n_rows, width)
        self.encoder = GraphEncoder(width, hidden, out_width, depth=depth, heads=heads, histology=histology)
        self.swav_head = _Prototypes(prototypes, out_width)
        rows = torch.arange(n_genes)
        self.register_buffer("gene_rows", torch.where(rows < self.n_rows, rows, -1))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("gain", torch.ones(n_genes))

    def bind(self, vocabulary: Vocabulary) -> None:
        """Look up the row of every gene of the model by its lower-cased name; unknown genes are left out."""
        if self.genes is None:
            return
        table = read_table(self.genes)
        rows = rows_of(vocabulary, table, source=self.genes, n_rows=self.n_rows, option="n_rows", lower=True)
        self.gene_rows.copy_(torch.tensor(rows))

    def fit(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take mean and deviation of every gene from ``x``, ``(n, G)``; genes that do not vary say nothing."""
        mean, deviation = masked_moments(x, mask)
        self.mean.copy_(mean)
        self.gain.copy_(torch.where(deviation > 0, 1.0 / deviation.clamp_min(1e-8), 0.0))

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint without what training left in it; rows and statistics of genes stay our own."""
        fusion = any(key.startswith("encoder.mlp_fusion.") for key in state)
        if self.encoder.mlp_fusion is not None and not fusion and "cell_embedder.embedding.weight" in state:
            msg = "the checkpoint has no part that reads H&E (encoder.mlp_fusion); build Novae with histology=0."
            raise DataIntegrityError(msg)
        out = {key: value for key, value in state.items() if not key.startswith(LEFTOVERS)}
        return {**out, "gene_rows": self.gene_rows, "mean": self.mean, "gain": self.gain}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the cell embeddings, ``(b, width)``."""
        known = self.gene_rows >= 0
        used = (known if mask is None else known & mask).to(x.dtype)
        genes = self.cell_embedder.linear(self.cell_embedder.embedding(self.gene_rows.clamp_min(0)))
        length = (used @ genes.square()).sqrt().clamp_min(1e-12)
        return ((x - self.mean) * self.gain * used) @ genes / length  # type: ignore[no-any-return]

    def niches(
        self, x: Tensor, graphs: NicheGraphs, mask: Tensor | None = None, *, histology: Tensor | None = None
    ) -> Tensor:
        """Return one vector a niche, ``(m, out_width)``.

        Parameters
        ----------
        x
            Log-normalised counts of the nodes, ``(n, G)``: rows ``graphs.nodes`` of the slide.
        graphs
            The niches.
        mask
            Which genes were measured, as in :meth:`forward`.
        histology
            H&E features of the spots, ``(m, histology)``.
        """
        return self.encoder(self(x, mask), graphs, histology)  # type: ignore[no-any-return]

    def prototypes(self, z: Tensor) -> Tensor:
        """Return the cosine of every niche vector with each prototype, ``(m, prototypes)``."""
        return self.swav_head(z)  # type: ignore[no-any-return]


def novae_options(folder: str | Path) -> dict[str, Any]:
    """Return the options that a published model's folder asks for.

    Parameters
    ----------
    folder
        Folder with ``config.json`` (and ``model.safetensors``, the ``weights``).
    """
    path = Path(folder).expanduser() / "config.json"
    config = read_json(path)
    named = {
        "width": "embedding_size",
        "hidden": "hidden_size",
        "depth": "num_layers",
        "heads": "heads",
        "out_width": "output_size",
        "prototypes": "num_prototypes",
    }
    options = {option: int(config[key]) for option, key in named.items() if key in config}
    return {"genes": str(path), "n_rows": len(read_table(path)), **options,
            "histology": int(config.get("histo_embedding_size", 0))}  # fmt: skip


def novae(
    spec: EncoderSpec,
    *,
    n_genes: int,
    genes: str | None = None,
    n_rows: int | None = None,
    width: int = 100,
    hidden: int = 128,
    depth: int = 10,
    heads: int = 8,
    out_width: int = 64,
    prototypes: int = 512,
    histology: int = 50,
) -> GeneEncoder:
    """Build Novae; options as in :class:`Novae`."""
    backbone = Novae(
        n_genes,
        genes=genes,
        n_rows=n_rows,
        width=width,
        hidden=hidden,
        depth=depth,
        heads=heads,
        out_width=out_width,
        prototypes=prototypes,
        histology=histology,
    )
    return GeneEncoder(spec, backbone, width=width, n_genes=n_genes)
