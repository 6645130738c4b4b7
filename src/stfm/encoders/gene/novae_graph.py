"""The graph part of Novae: GATv2 layers over the spots of a niche, then attention over them. Plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_count

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["GraphEncoder", "NicheGraphs"]

#: distance between neighbouring cells, µm, that Novae divides distances by
CELL_DISTANCE_UM = 20.0


class NicheGraphs:
    """The niches of some spots as one graph without edges between them.

    Parameters
    ----------
    distances
        Sparse (of scipy) ``(n, n)``: distance in µm between neighbours, stored once in each direction.
    spots
        Whose niches; ``(m,)``.
    n_hops
        A niche holds the spots that so many steps reach (Novae: 2), the spot itself among them.

    Attributes
    ----------
    nodes
        Position of every node among the n spots, int64.
    edges
        From and to, positions among the nodes, int64 ``(2, e)``.
    lengths
        Of the edges, in units of 20 µm, float32 ``(e, 1)``.
    niche
        Number of the niche of every node, 0 to m - 1, int64.
    """

    def __init__(self, distances: Any, spots: ArrayLike, *, n_hops: int = 2) -> None:
        check_count("n_hops", n_hops)
        graph = sparse.csr_array(distances).astype(np.float32)
        if graph.shape[0] != graph.shape[1]:
            msg = f"distances must be (n, n) between the spots of one slide, got shape {graph.shape}."
            raise InputError(msg)
        steps = sparse.csr_array(graph, copy=True)
        steps.data[:] = 1.0
        own = sparse.eye_array(graph.shape[0], format="csr", dtype=np.float32)
        reached = steps + own
        for _ in range(n_hops - 1):
            reached = reached @ steps + own
        wanted = np.asarray(spots, dtype=np.int64)
        rows = sparse.csr_array(reached[wanted])
        rows.sort_indices()
        self.nodes = torch.from_numpy(rows.indices.astype(np.int64))
        self.niche = torch.from_numpy(np.repeat(np.arange(len(wanted)), np.diff(rows.indptr)).astype(np.int64))
        self.n_niches = len(wanted)
        ends, lengths = [np.empty((2, 0), np.int64)], [np.empty(0, np.float32)]
        for start, stop in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
            members = rows.indices[start:stop]
            inside = sparse.coo_array(graph[members][:, members])
            ends.append(np.stack([inside.row, inside.col]).astype(np.int64) + start)
            lengths.append(inside.data.astype(np.float32))
        self.edges = torch.from_numpy(np.concatenate(ends, axis=1))
        self.lengths = torch.from_numpy(np.concatenate(lengths)[:, None] / np.float32(CELL_DISTANCE_UM))


def grouped_softmax(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Return the softmax of rows within each group."""
    index = group.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
    largest = values.new_full((n_groups, *values.shape[1:]), -torch.inf).scatter_reduce(0, index, values, "amax")
    weight = (values - largest[group]).exp()
    return weight / grouped_sum(weight, group, n_groups)[group].clamp_min(1e-16)


def grouped_sum(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Return the sum of rows of each group."""
    return values.new_zeros(n_groups, *values.shape[1:]).index_add(0, group, values)


class GATv2Layer(nn.Module):
    """Graph attention (Brody et al. 2022) with edge features; every node also attends to itself.

    The self-loop carries the mean feature of the edges that lead to the node.

    Parameters
    ----------
    in_width, out_width
        Widths of a node before and after.
    heads
        Attention heads.
    concatenate
        Heads side by side, each of ``out_width / heads``, or their mean, each of ``out_width``.
    """

    def __init__(self, in_width: int, out_width: int, heads: int, *, concatenate: bool) -> None:
        super().__init__()
        if concatenate and out_width % heads:
            msg = f"the hidden width must be a multiple of heads, got {out_width} and {heads}."
            raise InputError(msg)
        size = out_width // heads if concatenate else out_width
        self.heads, self.size, self.concatenate = heads, size, concatenate
        self.att = nn.Parameter(torch.empty(1, heads, size))
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.lin_l = nn.Linear(in_width, heads * size)
        self.lin_r = nn.Linear(in_width, heads * size)
        self.lin_edge = nn.Linear(1, heads * size, bias=False)
        nn.init.xavier_uniform_(self.att)

    def forward(self, x: Tensor, edges: Tensor, lengths: Tensor) -> Tensor:
        """Return ``(n, out_width)``; ``edges`` and ``lengths`` hold the self-loops already."""
        source, target = edges
        left = self.lin_l(x).view(-1, self.heads, self.size)[source]
        right = self.lin_r(x).view(-1, self.heads, self.size)[target]
        edge = self.lin_edge(lengths).view(-1, self.heads, self.size)
        score = (F.leaky_relu(left + right + edge, 0.2) * self.att).sum(dim=-1)
        weight = grouped_softmax(score, target, len(x))
        out = grouped_sum(left * weight.unsqueeze(-1), target, len(x))
        return (out.flatten(1) if self.concatenate else out.mean(dim=1)) + self.bias


def with_self_loops(edges: Tensor, lengths: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Return edges without their self-loops, then one a node; its length is the mean of those that lead to it."""
    kept = edges[0] != edges[1]
    edges, lengths = edges[:, kept], lengths[kept]
    count = grouped_sum(torch.ones_like(lengths), edges[1], n_nodes).clamp_min(1.0)
    mean = grouped_sum(lengths, edges[1], n_nodes) / count
    own = torch.arange(n_nodes, device=edges.device).expand(2, -1)
    return torch.cat([edges, own], dim=1), torch.cat([lengths, mean])


class _Gates(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_nn = nn.Linear(width, 1)
        self.nn = nn.Linear(width, width)


class _Aggregation(nn.Module):
    """One vector a niche: the mean of its nodes under learned attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_aggregation = _Gates(width)

    def forward(self, x: Tensor, niche: Tensor, n_niches: int) -> Tensor:
        """Return ``(m, width)``."""
        gate = grouped_softmax(self.attention_aggregation.gate_nn(x), niche, n_niches)
        return grouped_sum(gate * self.attention_aggregation.nn(x), niche, n_niches)


class _Convolutions(nn.Module):
    def __init__(self, in_width: int, hidden: int, out_width: int, depth: int, heads: int) -> None:
        super().__init__()
        widths = [in_width, *[hidden] * (depth - 1)]
        self.convs = nn.ModuleList(GATv2Layer(w, hidden, heads, concatenate=True) for w in widths[:-1])
        self.convs.append(GATv2Layer(widths[-1], out_width, heads, concatenate=False))


class GraphEncoder(nn.Module):
    """Nodes of niches -> one vector a niche; parameters named as in Novae's checkpoints.

    Parameters
    ----------
    in_width, hidden, out_width
        Width of a node's embedding, of the layers between, of the result.
    depth, heads
        Layers and attention heads.
    histology
        Width of H&E features that :attr:`mlp_fusion` joins; 0 for checkpoints without it.
    """

    def __init__(self, in_width: int, hidden: int, out_width: int, *, depth: int, heads: int, histology: int) -> None:
        super().__init__()
        check_count("depth", depth)
        self.gnn = _Convolutions(in_width, hidden, out_width, depth, heads)
        self.node_aggregation = _Aggregation(out_width)
        both = histology + out_width
        self.mlp_fusion = (
            nn.Sequential(
                nn.Linear(both, both), nn.ReLU(), nn.Linear(both, out_width), nn.ReLU(), nn.Linear(out_width, out_width)
            )
            if histology
            else None
        )

    def forward(self, x: Tensor, graphs: NicheGraphs, histology: Tensor | None = None) -> Tensor:
        """Return ``(m, out_width)``.

        Parameters
        ----------
        x
            Embeddings of the nodes ``(n, in_width)``.
        graphs
            Whose nodes these are.
        histology
            H&E features of the m spots, ``(m, histology)``.
        """
        if len(x) != len(graphs.nodes):
            msg = f"x must have a row for each of the {len(graphs.nodes)} nodes of the niches, got {len(x)}."
            raise InputError(msg)
        edges, lengths = with_self_loops(graphs.edges.to(x.device), graphs.lengths.to(x), len(x))
        for i, layer in enumerate(self.gnn.convs):
            x = layer(x, edges, lengths)
            if i < len(self.gnn.convs) - 1:
                x = F.elu(x)
        out: Tensor = self.node_aggregation(x, graphs.niche.to(x.device), graphs.n_niches)
        if histology is None:
            return out
        if self.mlp_fusion is None:
            msg = "this Novae has no part that reads H&E (option histology=0)."
            raise InputError(msg)
        return self.mlp_fusion(torch.cat([out, histology], dim=1))  # type: ignore[no-any-return]
