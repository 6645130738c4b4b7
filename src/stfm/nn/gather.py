"""Rows of all devices, with gradients: a contrastive loss needs every device's negatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Stack equally long blocks of all devices; the gradient of a block goes back to its device."""

    @staticmethod
    def forward(ctx: Any, block: Tensor) -> Tensor:
        ctx.rows = len(block)
        blocks = [torch.empty_like(block) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, block.contiguous())
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)  # every device used every block
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def is_distributed() -> bool:
    """Whether more than one device takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(*tensors: Tensor | None) -> tuple[list[Tensor | None], int]:
    """Stack the rows of all devices, in the order of their ranks.

    Parameters
    ----------
    *tensors
        Tensors with as many rows each (None stays None); devices may differ in the number of rows.

    Returns
    -------
    The stacked tensors, and where this device's rows begin. Without several devices: the tensors and 0.
    """
    present = [t for t in tensors if t is not None]
    if not present or not is_distributed():
        return list(tensors), 0
    n_rows = torch.tensor([len(present[0])], device=present[0].device)
    sizes = [torch.empty_like(n_rows) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, n_rows)
    counts = [int(size) for size in sizes]
    longest = max(counts)
    gathered = [None if t is None else _gather_padded(t, counts, longest) for t in tensors]
    return gathered, sum(counts[: dist.get_rank()])


def _gather_padded(tensor: Tensor, counts: list[int], longest: int) -> Tensor:
    """Gather blocks of unequal length: pad to the longest, then cut."""
    if len(tensor) < longest:
        filler = tensor.new_zeros((longest - len(tensor), *tensor.shape[1:]))
        tensor = torch.cat([tensor, filler])
    if tensor.requires_grad:
        stacked: Tensor = _AllGather.apply(tensor)  # type: ignore[no-untyped-call]
    else:
        blocks = [torch.empty_like(tensor) for _ in counts]
        dist.all_gather(blocks, tensor.contiguous())
        stacked = torch.cat(blocks)
    if all(n == longest for n in counts):
        return stacked
    return torch.cat([stacked[i * longest : i * longest + n] for i, n in enumerate(counts)])
