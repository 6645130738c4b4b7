"""Embeddings in a stream: a reader thread makes the next batch while the device computes this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from stfm._progress import progress
from stfm._validate import check_count
from stfm.inference.device import autocast, evaluating, resolve_device
from stfm.inference.readahead import read_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from stfm.models.base import Embedding, Model
    from stfm.models.inputs import SlideInputs
    from stfm.nn.batch import Batch

__all__ = ["PARTS", "Block", "embed_blocks", "embed_slides", "reading_order", "run_blocks"]

Result = TypeVar("Result")

#: attributes of an :class:`~stfm.models.base.Embedding`
PARTS = ("joint", "image", "gene", "niche")

_AHEAD = 2
#: height in µm of the strips in which a slide is read: a few rows of image blocks
_STRIP = 1000.0


@dataclass(frozen=True)
class Block:
    """Embeddings of some spots of one slide.

    Attributes
    ----------
    slide
        Number of the slide.
    indices
        Positions of the spots in it.
    parts
        ``"joint"``, ``"image"``, ``"gene"``, ``"niche"``: float32 ``(b, d)``; what has no modality is not in.
    """

    slide: int
    indices: NDArray[np.int64]
    parts: dict[str, NDArray[np.float32]]


def reading_order(inputs: SlideInputs) -> NDArray[np.int64]:
    """Return the spots of a slide in an order that passes over its image in strips, each region once."""
    if not inputs.has_image:
        return np.arange(inputs.n_obs)
    x, y = inputs.slide.coords[:, 0], inputs.slide.coords[:, 1]
    strip = _STRIP if inputs.slide.mpp is not None else _STRIP * 2  # px where µm are not known
    return np.lexsort((x, np.floor(y / strip)))


def embed_blocks(
    model: Model,
    inputs: Sequence[SlideInputs],
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> Iterator[Block]:
    """Yield the embeddings of all spots, block by block; memory does not grow with their number.

    Parameters
    ----------
    model
        The model; put back on its device and in its mode afterwards.
    inputs
        Slides made ready for it.
    batch_size
        Spots in a block; changes no result beyond rounding (1e-5 in fp32).
    device
        See :func:`~stfm.inference.device.resolve_device`.
    precision
        ``"fp32"`` or ``"bf16"`` (autocast; faster on GPUs, three digits).

    Yields
    ------
    A :class:`Block` a batch.
    """
    blocks = run_blocks(model, inputs, model.embed, batch_size=batch_size, device=device, precision=precision)
    for number, indices, embedding in blocks:
        yield Block(number, indices, _arrays(embedding))


def run_blocks(
    model: Model,
    inputs: Sequence[SlideInputs],
    step: Callable[[Batch], Result],
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> Iterator[tuple[int, NDArray[np.int64], Result]]:
    """Yield (number of the slide, positions of the spots, what ``step`` makes of their batch), block by block.

    Parameters
    ----------
    model
        The model; put back on its device and in its mode afterwards.
    inputs
        Slides made ready for it.
    step
        Called with batches on the device, without gradients.
    batch_size, device, precision
        As of :func:`embed_blocks`.
    """
    check_count("batch_size", batch_size)
    where = resolve_device(device)

    def batches() -> Iterator[tuple[int, NDArray[np.int64], Batch]]:
        for number, one in enumerate(inputs):
            order = reading_order(one)
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                yield number, indices, one.batch(indices)

    with evaluating(model, where), autocast(where, precision):
        for number, indices, batch in read_ahead(batches(), depth=_AHEAD):
            yield number, indices, step(batch.to(where))


def embed_slides(
    model: Model,
    inputs: Sequence[SlideInputs],
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
) -> list[dict[str, NDArray[np.float32]]]:
    """Return the embeddings of each slide, spots in their order (parameters as of :func:`embed_blocks`).

    Returns
    -------
    For each slide: part -> float32 ``(n, d)``; a part whose modality is absent is not in.
    """
    results: list[dict[str, NDArray[np.float32]]] = [{} for _ in inputs]
    total = sum(one.n_obs for one in inputs)
    blocks = embed_blocks(model, inputs, batch_size=batch_size, device=device, precision=precision)
    with progress("Embedding", total) as advance:
        for block in blocks:
            arrays = results[block.slide]
            for name, values in block.parts.items():
                if name not in arrays:
                    arrays[name] = np.empty((inputs[block.slide].n_obs, values.shape[1]), np.float32)
                arrays[name][block.indices] = values
            advance(len(block.indices))
    return results


def _arrays(embedding: Embedding) -> dict[str, NDArray[np.float32]]:
    tensors = {name: getattr(embedding, name) for name in PARTS}
    return {name: t.float().cpu().numpy() for name, t in tensors.items() if t is not None}
