"""Image tower of CLIP; reads the layouts of openai / open_clip (CLIP) and of transformers (PLIP)."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.layouts import CLIP_LAYOUTS
from stfm.encoders.image.pooling import Pooling
from stfm.nn.transformer import QuickGELU, SelfAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


class ResidualBlock(nn.Module):
    """Pre-norm block of CLIP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """The stack, under openai's name ``resblocks``."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)``."""
        for block in self.resblocks:
            x = block(x)
        return x


class ClipVision(nn.Module):
    """Image tower, parameters named as ``visual.*`` of openai's checkpoints.

    Parameters
    ----------
    image_px, patch, width, depth, heads, out_width
        Of the tower; ViT-B/32 is 224, 32, 768, 12, 12, 512.
    pooling, stages
        ``"own"`` is the class token projected into the space of the text, ``"cls"`` the class token before; see
        :class:`~stfm.encoders.image.pooling.Pooling`.
    """

    layouts = CLIP_LAYOUTS

    def __init__(
        self,
        *,
        image_px: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        out_width: int,
        pooling: str = "own",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if image_px % patch:
            msg = f"image_px must be a multiple of patch, got {image_px} and {patch}."
            raise InputError(msg)
        self.pool = Pooling(pooling, widths=[width] * depth, own=out_width, cls=True, stages=stages)
        n_tokens = (image_px // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(n_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, depth)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, out_width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, out_width)``."""
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x, stages = self.ln_pre(x), []
        for i, block in enumerate(self.transformer.resblocks):
            x = block(x)
            if self.pool.takes(i):
                stages.append(self.pool.moments(x[:, 1:]))
        x = self.ln_post(x)
        own = x[:, 0] @ self.proj if self.pool.kind == "own" else None
        return self.pool.join(stages, patches=x[:, 1:], cls=x[:, 0], own=own)


def clip_vit(
    spec: EncoderSpec,
    *,
    patch: int = 32,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    out_width: int = 512,
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build an image tower of CLIP; options as in :class:`ClipVision`."""
    backbone = ClipVision(
        image_px=spec.input_px or 224,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        out_width=out_width,
        pooling=pooling or spec.pooling or "own",
        stages=stages,
    )
    return ImageEncoder(spec, backbone, width=backbone.pool.width)
