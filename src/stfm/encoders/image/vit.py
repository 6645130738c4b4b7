"""Vision transformers with the parameter names of timm, as pathology encoders (UNI) are published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.encoders.base import ImageEncoder

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec


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

    def __init__(self, width: int, heads: int, hidden: int, layer_scale: float | None, *, gated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
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
    """Vision transformer whose class token, normalised, is the feature.

    Parameters
    ----------
    image_px, patch
        Sides of the tile and of a patch, px.
    width, depth, heads, hidden
        Of the transformer.
    layer_scale
        Start of LayerScale, or None.
    registers
        Tokens beside the class token that hold nothing of their own (DINOv2 with registers); the table of positions
        then leaves out the class token.
    gated
        SwiGLU for the feed-forward; ``hidden`` is the width after the gate.
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
        gated: bool = False,
    ) -> None:
        super().__init__()
        if image_px % patch or width % heads:
            msg = f"image_px must be a multiple of patch and width of heads: {image_px}, {patch}, {width}, {heads}."
            raise InputError(msg)
        n_tokens = (image_px // patch) ** 2 + (registers == 0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens, width))
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, layer_scale, gated=gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        x = self.patch_embed(x)
        first = self.cls_token.expand(len(x), -1, -1)
        if self.reg_token is None:
            x = torch.cat([first, x], dim=1) + self.pos_embed
        else:
            x = torch.cat([first, self.reg_token.expand(len(x), -1, -1), x + self.pos_embed], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])  # type: ignore[no-any-return]

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop a classifier, if the checkpoint has one."""
        return {k: v for k, v in state.items() if not k.startswith("head.")}


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
    gated: bool = False,
) -> ImageEncoder:
    """Build a vision transformer; options as in :class:`VisionTransformer` (``hidden`` is four times the width)."""
    backbone = VisionTransformer(
        image_px=spec.input_px or 224,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden or 4 * width,
        layer_scale=layer_scale,
        registers=registers,
        gated=gated,
    )
    return ImageEncoder(spec, backbone, width=width)
