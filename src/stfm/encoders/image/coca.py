"""Image tower of CoCa as CONCH publishes it: a vision transformer and one learned query over its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stfm._errors import InputError
from stfm.encoders.base import ImageEncoder
from stfm.encoders.image.layouts import coca_layouts
from stfm.encoders.image.pooling import Pooling
from stfm.encoders.image.vit import VisionTransformer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stfm.encoders.spec import EncoderSpec


class CrossAttention(nn.Module):
    """Multi-head attention whose keys are of another width; parameters named as in ``nn.MultiheadAttention``."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            msg = f"out_width must be a multiple of the pooler's heads, got {width} and {heads}."
            raise InputError(msg)
        self.heads = heads
        self.q_proj_weight = nn.Parameter(torch.empty(width, width))
        self.k_proj_weight = nn.Parameter(torch.empty(width, context))
        self.v_proj_weight = nn.Parameter(torch.empty(width, context))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            nn.init.xavier_uniform_(weight)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """Return ``(b, q, width)`` from ``(b, q, width)`` and ``(b, t, context)``."""
        biases = self.in_proj_bias.chunk(3)
        q = F.linear(query, self.q_proj_weight, biases[0])
        k = F.linear(context, self.k_proj_weight, biases[1])
        v = F.linear(context, self.v_proj_weight, biases[2])
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class AttentionalPooler(nn.Module):
    """One learned query that looks at all tokens."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attn = CrossAttention(width, context, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(context)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.attn(query, self.ln_k(tokens))[:, 0]  # type: ignore[no-any-return]


class CocaVision(nn.Module):
    """Contrastive image tower of CoCa, parameters named as ``visual.*`` of CONCH's checkpoint.

    Parameters
    ----------
    trunk
        The vision transformer.
    width, out_width
        Of its tokens; of the pooled vector.
    pooler_heads
        Heads of the attentional pooler.
    project
        Multiply with the projection into the space of the text; CONCH's own image features are without.
    pooling, stages
        ``"own"`` is the attentional pooler; else as of the trunk.
    """

    def __init__(
        self,
        trunk: VisionTransformer,
        *,
        width: int,
        out_width: int = 512,
        pooler_heads: int = 8,
        project: bool = False,
        pooling: str = "own",
        stages: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = AttentionalPooler(out_width, width, pooler_heads)
        self.ln_contrast = nn.LayerNorm(out_width)
        self.proj_contrast = nn.Parameter(torch.randn(out_width, out_width) * width**-0.5) if project else None
        self.pool = Pooling(pooling, widths=[width] * len(trunk.blocks), own=out_width, cls=True, stages=stages)
        trunk.pool = self.pool
        self.layouts = coca_layouts(project=project)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width)``."""
        tokens, stages = self.trunk.tokens(x)
        own = None
        if self.pool.kind == "own":
            own = self.ln_contrast(self.attn_pool_contrast(tokens))
            own = own if self.proj_contrast is None else own @ self.proj_contrast
        return self.pool.join(stages, patches=tokens[:, self.trunk.n_prefix :], cls=tokens[:, 0], own=own)


def coca(
    spec: EncoderSpec,
    *,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    out_width: int = 512,
    pooler_heads: int = 8,
    project: bool = False,
    pooling: str | None = None,
    stages: Sequence[int] | None = None,
) -> ImageEncoder:
    """Build the image tower of a CoCa; options as in :class:`CocaVision` and of its trunk."""
    trunk = VisionTransformer(
        image_px=spec.input_px or 448,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        hidden=4 * width,
        layer_scale=None,
    )
    backbone = CocaVision(
        trunk,
        width=width,
        out_width=out_width,
        pooler_heads=pooler_heads,
        project=project,
        pooling=pooling or spec.pooling or "own",
        stages=stages,
    )
    return ImageEncoder(spec, backbone, width=backbone.pool.width)
