"""Weights in half the bytes: matrices as fp16, whatever would suffer from it in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["DTYPES", "stored"]

#: how the weights of a saved model may be stored; loading gives the model's own dtype in any case
DTYPES = ("fp32", "fp16")
#: relative error (Frobenius) above which a tensor is not stored as fp16; rounding alone gives about 2e-4
_TOLERANCE = 1e-3


def stored(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return the tensors as they go to a file.

    Parameters
    ----------
    state
        Of a model.
    dtype
        ``"fp32"``: as they are. ``"fp16"``: floating tensors of two and more dimensions as fp16. Vectors and scalars
        (biases, norms, means, deviations, temperatures) weigh next to nothing and keep their digits; so does a tensor
        with values that fp16 cannot hold, too big or too small.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if dtype == "fp32":
        return plain
    return {name: _halved(tensor) if _is_wide(tensor) else tensor for name, tensor in plain.items()}


def _is_wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.element_size() > 2


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    error = (half.to(tensor.dtype) - tensor).norm()
    return half if bool(half.isfinite().all() & (error <= _TOLERANCE * tensor.norm())) else tensor
