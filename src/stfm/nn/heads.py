"""Small maps at the ends: projections into the shared space, and the paper's MLP for expression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECTIONS = ("linear", "mlp", "none")
NORMS = ("none", "batch", "layer")


class Projection(nn.Sequential):
    """Map of an encoder's features to the shared width d (table of open choices in the docs, row 7).

    Parameters
    ----------
    in_width, out_width
        Width of the features and d.
    kind
        ``"linear"``; ``"mlp"``: two layers with GELU; ``"none"``: identity, only where the widths agree.
    norm
        Put the features on one scale first: ``"batch"`` (per feature, running statistics in evaluation), ``"layer"``
        or ``"none"``. Frozen features have any scale, so ``"batch"`` helps them.
    dropout
        On the features.
    normalise
        Layer norm on the result, so that both modalities come into the fusion at one scale.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        kind: str = "linear",
        norm: str = "none",
        dropout: float = 0.0,
        normalise: bool = False,
    ) -> None:
        check_choice("projection", kind, PROJECTIONS)
        check_choice("projection_norm", norm, NORMS)
        layers: list[nn.Module] = []
        if norm == "batch":
            layers.append(nn.BatchNorm1d(in_width, affine=False))
        elif norm == "layer":
            layers.append(nn.LayerNorm(in_width))
        if dropout:
            layers.append(nn.Dropout(dropout))
        if kind == "linear":
            layers.append(nn.Linear(in_width, out_width))
        elif kind == "mlp":
            hidden = max(in_width, out_width)
            layers += [nn.Linear(in_width, hidden), nn.GELU(), nn.Linear(hidden, out_width)]
        elif in_width != out_width:
            msg = (
                f"projection='none' needs encoders of the shared width {out_width}, and this one has {in_width}: "
                "use projection='linear' (or another width)."
            )
            raise InputError(msg)
        if normalise:
            layers.append(nn.LayerNorm(out_width))
        super().__init__(*layers)


class MLPHead(nn.Module):
    """Multi-layer perceptron from features to expression (paper, section 4.4; its size is not stated there).

    Parameters
    ----------
    in_width, out_width
        Features and genes.
    hidden
        Widths of the hidden layers.
    dropout
        After every hidden layer.
    norm
        Of the input, as in :class:`Projection`.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        hidden: Sequence[int] = (256,),
        dropout: float = 0.1,
        norm: str = "none",
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        layers: list[nn.Module] = []
        if norm != "none":
            layers.append(nn.BatchNorm1d(in_width, affine=False) if norm == "batch" else nn.LayerNorm(in_width))
        width = in_width
        for size in hidden:
            layers += [nn.Linear(width, size), nn.GELU(), nn.Dropout(dropout)]
            width = size
        layers.append(nn.Linear(width, out_width))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(b, out_width)``."""
        return self.layers(features)  # type: ignore[no-any-return]
