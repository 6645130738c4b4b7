"""Vision transformers with the parameter names of timm, as most pathology encoders are published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm._validate import check_choice
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.layouts import vit_layouts
from stfm.encoders.image.pooling import Pooling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


POSITIONS = ("all", "patches")


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``γ x``."""
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention with q, k, v in one map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two linear maps with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class GatedFeedForward(nn.Module):
    """SwiGLU with gate and value packed into one map: ``fc2(silu(gate) value)``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm block, its branches scaled when ``layer_scale`` is given."""

    def __init__(
        self, width: int, heads: int, hidden: int, layer_scale: float | None, *, gated: bool, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = GatedFeedForward(width, hidden) if gated else FeedForward(width, hidden)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Vision transformer; the feature is its class token, normalised, unless another pooling is asked for.

    Parameters
    ----------
    image_px, patch
        Sides of the tile and of a patch, px.
    width, depth, heads, hidden
        Of the transformer.
    layer_scale
        Start of LayerScale, or None.
    registers
        Tokens beside the class token that hold nothing of their own (DINOv2 with registers).
    positions
        What the table of positions covers: ``"all"``, the class token and the patches; ``"patches"`` alone.
    gated
        SwiGLU for the feed-forward; ``hidden`` is the width after the gate.
    eps
        Of the layer norms.
    pooling, stages
        See :class:`~stfm.encoders.image.pooling.Pooling`; stages are blocks, their patches before the last norm.
    """

    def __init__(
        self,
        *,
        image_px: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        layer_scale: float | None,
        registers: int = 0,
        positions: str = "all",
        gated: bool = False,
        eps: float = 1e-6,
        pooling: str = "cls",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if image_px % patch or width % heads:
            msg = f"image_px must be a multiple of patch and width of heads: {image_px}, {patch}, {width}, {heads}."
            raise InputError(msg)
        self.covers_cls = check_choice("positions", positions, POSITIONS) == "all"
        self.pool = Pooling(pooling, widths=[width] * depth, cls=True, stages=stages)
        self.layouts = vit_layouts(
            registers=registers > 0, gated=gated, scaled=layer_scale is not None, covers_cls=self.covers_cls
        )
        n_tokens = (image_px // patch) ** 2 + self.covers_cls
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, layer_scale, gated=gated, eps=eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def n_prefix(self) -> int:
        """Number of tokens before the patches."""
        return 1 + (0 if self.reg_token is None else self.reg_token.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        tokens, stages = self.tokens(x)
        return self.pool.join(stages, patches=tokens[:, self.n_prefix :], cls=tokens[:, 0])

    def tokens(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return all tokens after the last norm, ``(b, t, d)``, and moments of the stages looked at."""
        x = self._embedded(x)
        stages = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.pool.takes(i):
                stages.append(self.pool.moments(x[:, self.n_prefix :]))
        return self.norm(x), stages

    def _embedded(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        # The table may or may not hold a place for the class token; registers have none and come after it.
        first = self.cls_token.expand(len(x), -1, -1)
        if self.covers_cls:
            first, x = first + self.pos_embed[:, :1], x + self.pos_embed[:, 1:]
        else:
            x = x + self.pos_embed
        middle = [] if self.reg_token is None else [self.reg_token.expand(len(x), -1, -1)]
        return torch.cat([first, *middle, x], dim=1)


def vit(
    spec: EncoderSpec,
    *,
    patch: int = 16,
    width: int = 1024,
    depth: int = 24,
    heads: int = 16,
    hidden: int | None = None,
    layer_scale: float | None = 1e-5,
    registers: int = 0,
    positions: str | None = None,
    gated: bool = False,
    eps: float = 1e-6,
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build a vision transformer; options as in :class:`VisionTransformer`.

    ``layer_scale = 0`` leaves it out. ``hidden`` is four times the width, and the table of positions covers the class
    token where there are no registers, unless they are given.
    """
    backbone = VisionTransformer(
        image_px=spec.input_px or 224,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden or 4 * width,
        layer_scale=layer_scale or None,
        registers=registers,
        positions=positions or ("patches" if registers else "all"),
        gated=gated,
        eps=eps,
        pooling=pooling or spec.pooling or "cls",
        stages=stages,
    )
    return ImageEncoder(spec, backbone, width=backbone.pool.width)
