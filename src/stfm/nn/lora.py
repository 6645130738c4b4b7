"""Low-rank adaptation of linear layers, without new names for the weights that are there."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_count


class LoRALinear(nn.Linear):
    """Linear layer with a trainable low-rank addition ``W + (α / r) B A``; W and the bias stay as they are.

    A drop-in for ``nn.Linear``: ``weight`` and ``bias`` keep their names, so published checkpoints load as before.

    Parameters
    ----------
    linear
        Layer to adapt; its parameters are taken over (not copied) and frozen.
    rank, alpha
        r and α. B starts at zero: nothing changes before training.
    dropout
        On the input of the addition.

    References
    ----------
    Hu et al., LoRA, 2021, arXiv 2106.09685.
    """

    def __init__(self, linear: nn.Linear, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        check_count("rank", rank)
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        if bias:
            self.bias = linear.bias
            self.bias.requires_grad_(False)
        like = linear.weight
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=like.device, dtype=like.dtype))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=like.device, dtype=like.dtype))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x Wᵀ + b + (α / r) x Aᵀ Bᵀ``."""
        low = F.linear(F.linear(self.lora_dropout(input), self.lora_a), self.lora_b)
        return super().forward(input) + self.scaling * low


def apply_lora(module: nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> int:
    """Freeze a module and give each of its ``nn.Linear`` layers a trainable low-rank addition.

    Returns
    -------
    Number of layers adapted.

    Raises
    ------
    InputError
        The module has no linear layer (a convolutional encoder): train it in full instead.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        msg = f"{type(module).__name__} has no linear layers to adapt; use mode='full' or mode='frozen'."
        raise InputError(msg)
    module.requires_grad_(requires_grad=False)
    for parent, name, child in found:
        setattr(parent, name, LoRALinear(child, rank=rank, alpha=alpha, dropout=dropout))
    return len(found)
