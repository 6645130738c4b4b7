"""What moved an output of a model: integrated gradients on what it read of a spot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from stfm._errors import InputError
from stfm._optional import require
from stfm._progress import progress
from stfm._validate import check_choice, check_count
from stfm.inference.device import evaluating, resolve_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from stfm.models.base import Model
    from stfm.models.inputs import SlideInputs
    from stfm.nn.batch import Batch

    Target = Callable[[Batch], Tensor]

__all__ = ["BASELINES", "Attribution", "attribute_spots", "integrated_gradients", "target_of"]

BASELINES = ("mean", "zero")
_IMAGE = ("spot_tiles", "spot_features", "niche_tiles", "niche_features")
_GENE = ("counts", "niche_counts")
#: rows (spots) of a model's batch at once
_ROWS = 2048
#: spots of a slide that its mean is taken over
_MEAN_OF = 512


@dataclass(frozen=True)
class Attribution:
    """What moved an output of one spot.

    Attributes
    ----------
    rows
        Positions of the spots that were read, int64 ``(w,)``.
    image
        What each of their tiles adds to the output, float64 ``(w,)``; None without H&E.
    gene
        What each of their counts adds, float64 ``(w, G)``; None without counts.
    output, baseline
        The output, and that of the baseline; their difference is the sum of all attributions, up to O(1 / steps).
    """

    rows: NDArray[np.int64]
    image: NDArray[np.float64] | None
    gene: NDArray[np.float64] | None
    output: float
    baseline: float

    @property
    def total(self) -> float:
        """Sum of all attributions."""
        return float(sum(part.sum() for part in (self.image, self.gene) if part is not None))


def integrated_gradients(
    f: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    baselines: tuple[Tensor, ...],
    *,
    n_steps: int = 50,
    batch_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Return ``(x - x0)`` times the mean gradient on the way from ``x0`` to ``x``, by the midpoint rule.

    Parameters
    ----------
    f
        Takes tensors ``(m, ...)`` like the inputs, returns ``(m,)``.
    inputs, baselines
        x and x0, tensors ``(b, ...)``.
    n_steps
        Steps of the rule, two or more.
    batch_size
        Points of the way at once; all by default.

    Returns
    -------
    Attributions in the shapes of the inputs.

    References
    ----------
    Sundararajan, Taly & Yan, Axiomatic Attribution for Deep Networks, ICML 2017.
    """
    check_count("n_steps", n_steps, minimum=2)
    require("captum", extra="attribution")
    method = require("captum.attr", extra="attribution").IntegratedGradients(f, multiply_by_inputs=True)
    with torch.enable_grad():
        parts = method.attribute(
            inputs, baselines, n_steps=n_steps, method="riemann_middle", internal_batch_size=batch_size
        )
    return tuple(part.detach() for part in parts)


def target_of(model: Model, target: int | NDArray[np.floating], *, own: bool = False) -> Target:
    """Return the function of a batch whose value is explained: a predicted gene, or a direction of the embedding.

    Parameters
    ----------
    model
        The model.
    target
        Position of a gene in the vocabulary, or a direction ``(d,)`` of the joint embedding.
    own
        Whether the counts of a spot may be used for its own prediction.
    """
    if isinstance(target, (int, np.integer)):
        return lambda batch: model.predict(batch, own=own).mean[:, int(target)]
    direction = torch.as_tensor(np.asarray(target, dtype=np.float32))

    def along(batch: Batch) -> Tensor:
        joint = model.embed(batch).joint
        if direction.shape != joint.shape[1:]:
            msg = (
                f"target has shape {tuple(direction.shape)}; a direction of this embedding has {joint.shape[1]} values."
            )
            raise InputError(msg)
        return joint @ direction.to(joint)

    return along


def attribute_spots(
    model: Model,
    inputs: SlideInputs,
    spots: Sequence[int] | NDArray[np.int64],
    target: Target,
    *,
    n_steps: int = 50,
    baseline: str = "mean",
    device: str | torch.device = "auto",
) -> list[Attribution]:
    """Return what moved the output of some spots of a slide.

    Parameters
    ----------
    model
        The model.
    inputs
        A slide made ready for it; tiles are explained as a whole, by their features where an encoder is frozen.
    spots
        Positions of the spots.
    target
        See :func:`target_of`.
    n_steps
        Steps on the way from the baseline to the spot.
    baseline
        ``"mean"``: every spot of the window is an average one of the slide; ``"zero"``: white tiles (features of 0) and
        no counts.
    device
        See :func:`~stfm.inference.device.resolve_device`.
    """
    check_choice("baseline", baseline, BASELINES)
    check_count("n_steps", n_steps, minimum=2)
    where = resolve_device(device)
    start = _baseline(inputs, baseline)
    with evaluating(model, where, gradients=True), progress("Attributing", len(spots)) as advance:
        found = []
        for spot in spots:
            found.append(_attribute(inputs.batch(np.array([spot])).to(where), start, target, n_steps))
            advance(1)
    return found


def _attribute(batch: Batch, start: dict[str, Tensor], target: Target, n_steps: int) -> Attribution:
    """Explain the output of the one spot of a batch."""
    names = [name for name in (*_IMAGE, *_GENE) if getattr(batch, name) is not None]
    x = tuple(_as_float(getattr(batch, name))[None] for name in names)
    x0 = tuple(start[name].to(t).expand_as(t) for name, t in zip(names, x, strict=True))

    def f(*values: Tensor) -> Tensor:
        return target(_repeated(batch, dict(zip(names, values, strict=True))))

    at_once = max(1, _ROWS // batch.n_rows)
    parts = dict(zip(names, integrated_gradients(f, x, x0, n_steps=n_steps, batch_size=at_once), strict=True))
    with torch.no_grad():
        output, before = float(f(*x)), float(f(*x0))
    image = [parts[name][0].flatten(1).sum(dim=1) for name in _IMAGE if name in parts]
    gene = [parts[name][0] for name in _GENE if name in parts]
    rows = cast("Tensor", batch.index).cpu().numpy()
    return Attribution(rows, _sum(image), _sum(gene), output, before)


def _sum(parts: list[Tensor]) -> NDArray[np.float64] | None:
    return None if not parts else torch.stack(parts).sum(dim=0).double().cpu().numpy()


def _repeated(batch: Batch, values: dict[str, Tensor]) -> Batch:
    """Return the batch of one spot once for each of m sets of values, ``(m, n_rows, ...)``."""
    m, n = next(iter(values.values())).shape[:2]
    fields = {name: t.repeat(m, *[1] * (t.ndim - 1)) for name, t in batch.tensors().items() if name not in values}
    fields |= {name: t.flatten(0, 1) for name, t in values.items()}
    if batch.window is not None:
        shift = n * torch.arange(m, device=batch.window.device)[:, None]
        fields["window"] = torch.where(batch.window >= 0, batch.window + shift, -1)
    return replace(batch, **fields)


def _as_float(x: Tensor) -> Tensor:
    """Return what gradients can be taken of; tiles become 0..1."""
    return x if x.is_floating_point() else x.float() / 255


def _baseline(inputs: SlideInputs, baseline: str) -> dict[str, Tensor]:
    """Return the value of each input that a spot starts from, ``(1, 1, ...)``."""
    n = inputs.n_obs if baseline == "mean" else 1
    index = np.unique(np.linspace(0, inputs.n_obs - 1, min(n, _MEAN_OF)).astype(np.int64))
    batch = inputs.spots(index)
    start = {}
    for name in (*_IMAGE, *_GENE):
        value = getattr(batch, name)
        if value is None:
            continue
        mean = _as_float(value).mean(dim=0)[None, None]
        white = 0.0 if value.is_floating_point() else 1.0
        start[name] = mean if baseline == "mean" else torch.full_like(mean, white)
    return start
