"""STORM's spatial level: windows of spots, masks, the encoder and the decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm.nn.attention import DistanceBias, ExpertBlock, mask_keys

if TYPE_CHECKING:
    from stfm.models.storm_config import STORMConfig

#: order of the modalities, and of their experts
MODALITIES = ("image", "gene")


@dataclass(frozen=True)
class Shown:
    """Where the windows have spots, and which tokens of each modality are shown, bool ``(b, w)``."""

    present: Tensor
    image: Tensor
    gene: Tensor

    def of(self, modality: str) -> Tensor:
        """Return those of a modality."""
        return self.image if modality == "image" else self.gene


def draw_masks(present: Tensor, image: Tensor, gene: Tensor, *, n_visible: int, cross_share: float) -> Shown:
    """Draw which tokens of each window are shown.

    In most windows ``n_visible`` spots of each modality by itself; in a share of them all of H&E and the counts of any
    number of spots.

    Parameters
    ----------
    present
        Where there is a spot, bool ``(b, w)``.
    image, gene
        Where there is a token, bool ``(b, w)``.
    n_visible, cross_share
        See :class:`~stfm.models.storm_config.STORMConfig`.
    """
    windows = len(image)
    few = {"image": _some(image, n_visible), "gene": _some(gene, n_visible)}
    cross = (torch.rand(windows, 1, device=image.device) < cross_share) & image.any(dim=1, keepdim=True)
    # From none to all of the window, few more often: nobody knows how much of a slide will be measured.
    limit = (torch.rand(windows, 1, device=image.device).square() * (gene.shape[1] + 1)).floor()
    return Shown(present, torch.where(cross, image, few["image"]), torch.where(cross, _some(gene, limit), few["gene"]))


def _some(present: Tensor, n: int | Tensor) -> Tensor:
    """Choose ``n`` of the present tokens of each window."""
    order = torch.rand(present.shape, device=present.device).masked_fill(~present, 2.0)
    return (order.argsort(dim=1).argsort(dim=1) < n) & present


@dataclass(frozen=True)
class Windows:
    """The windows of a batch.

    Attributes
    ----------
    rows
        Row of the batch in each place, int64 ``(b, w)``; 0 where there is no spot.
    present, image, gene
        Where there is a spot, H&E of it, counts of it, bool ``(b, w)``.
    tokens
        Tokens of the modalities that are there, ``(b, w, d)``.
    features
        Scaled image features of the batch's rows, ``(n, f)``, or None.
    xy_um
        Coordinates, ``(b, w, 2)`` or ``(b, w, 3)``.
    bias
        Distance bias, ``(b, h, w, w)``.
    """

    rows: Tensor
    present: Tensor
    image: Tensor
    gene: Tensor
    tokens: dict[str, Tensor]
    features: Tensor | None
    xy_um: Tensor
    bias: Tensor

    def shown(self, *, image: bool = True, gene: bool = True) -> Shown:
        """Return a mask that shows all of some modalities."""
        none = torch.zeros_like(self.present)
        return Shown(self.present, self.image if image else none, self.gene if gene else none)


class SpatialEncoder(nn.Module):
    """Blocks over the tokens of both modalities of a window, with distance bias and one feed-forward a modality.

    Parameters
    ----------
    config
        Width, depth, heads, experts and distance bias.
    """

    def __init__(self, config: STORMConfig) -> None:
        super().__init__()
        self.modality = nn.Parameter(torch.randn(len(MODALITIES), config.width) * 0.02)
        self.distance = DistanceBias(config.heads, unit_um=config.distance_unit_um, learned=config.learn_slopes)
        self.use_distance = config.distance_bias and config.ablation != "no-distance"
        shared = config.shared_experts or config.ablation == "shared-experts"
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            ExpertBlock(
                config.width,
                config.heads,
                int(config.width * config.mlp_ratio),
                n_experts=1 if shared else len(MODALITIES),
                dropout=config.dropout,
                drop_path=rate,
            )
            for rate in rates
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in MODALITIES)

    def bias(self, xy_um: Tensor) -> Tensor:
        """Return the bias between the spots of each window, ``(b, h, w, w)``; zero without distance bias."""
        return self.distance(xy_um if self.use_distance else torch.zeros_like(xy_um))  # type: ignore[no-any-return]

    def forward(self, tokens: dict[str, Tensor], shown: Shown, bias: Tensor) -> dict[str, Tensor]:
        """Return encoded tokens of each modality that is there, ``(b, w, d)``; only shown tokens are attended to."""
        names = [name for name in MODALITIES if name in tokens]
        experts = [MODALITIES.index(name) for name in names]
        x = torch.cat([tokens[n] + self.modality[e] for n, e in zip(names, experts, strict=True)], dim=1)
        hidden = torch.cat([~shown.of(name) for name in names], dim=1)
        tiled = mask_keys(bias.repeat(1, 1, len(names), len(names)), hidden)
        sizes = [tokens[name].shape[1] for name in names]
        for block in self.blocks:
            x = block(x, experts, sizes, bias=tiled)
        parts = x.split(sizes, dim=1)
        return {n: self.norms[e](part) for n, e, part in zip(names, experts, parts, strict=True)}


class Decoder(nn.Module):
    """A light decoder of one modality: blocks over the spots of a window, then an MLP.

    A spot enters as the sum of its encoded tokens, each replaced by a mask token where it is hidden. So what one
    modality shows of a spot lies where the other is to be written, and attention only has to bring in the neighbours.

    Parameters
    ----------
    config
        Width, heads and number of blocks.
    out_width
        Width of what it writes.
    """

    def __init__(self, config: STORMConfig, out_width: int) -> None:
        super().__init__()
        d = config.width
        self.mask_tokens = nn.ParameterDict({name: nn.Parameter(torch.zeros(d)) for name in MODALITIES})
        self.enter = nn.ModuleDict({name: nn.Linear(d, d) for name in MODALITIES})
        self.blocks = nn.ModuleList(
            ExpertBlock(d, config.heads, int(d * config.mlp_ratio), n_experts=1, dropout=config.dropout)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(d)
        self.out = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, out_width))

    def forward(self, encoded: dict[str, Tensor], shown: Shown, bias: Tensor, *, middle: bool = False) -> Tensor:
        """Return ``(b, w, out_width)``, or of the middle of each window alone ``(b, 1, out_width)``."""
        like = next(iter(encoded.values()))
        x = torch.zeros_like(like)
        for name in MODALITIES:
            mask = self.mask_tokens[name].to(like.dtype)
            entered = self.enter[name](encoded[name]) if name in encoded else like
            x = x + torch.where(shown.of(name)[..., None], entered, mask)
        sizes = [x.shape[1]]
        kept = mask_keys(bias, ~shown.present)
        for block in self.blocks:
            x = block(x, [0], sizes, bias=kept)
        return self.out(self.norm(x[:, :1] if middle else x))  # type: ignore[no-any-return]
