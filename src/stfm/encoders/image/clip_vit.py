"""Image tower of CLIP; reads the layouts of openai / open_clip (CLIP) and of transformers (PLIP)."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stfm.encoders.base import ImageEncoder
from stfm.nn.transformer import QuickGELU, SelfAttention

if TYPE_CHECKING:
    from stfm.encoders.spec import EncoderSpec

# transformers' name of a part of a layer -> openai's
_HF_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_TOP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}


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
    """

    def __init__(self, *, image_px: int, patch: int, width: int, depth: int, heads: int, out_width: int) -> None:
        super().__init__()
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
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # type: ignore[no-any-return]

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the image tower's part of a checkpoint of either layout, in openai's names."""
        if any(key.startswith("vision_model.") for key in state):
            return from_transformers(state)
        if any(key.startswith("visual.") for key in state):
            return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
        return state


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the image tower of a transformers ``CLIPModel`` to openai's names; q, k, v become one map."""
    out: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key == "visual_projection.weight":
            out["proj"] = value.T
        elif key.startswith("vision_model."):
            name = key.removeprefix("vision_model.")
            layer = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
            if layer is None:
                if name in _HF_TOP:  # what is left is the buffer of position ids
                    out[_HF_TOP[name]] = value
                continue
            number, part, kind = layer.groups()
            prefix = f"transformer.resblocks.{number}"
            if part in _HF_PARTS:
                out[f"{prefix}.{_HF_PARTS[part]}.{kind}"] = value
            else:  # self_attn.q_proj, k_proj, v_proj
                qkv.setdefault(f"{prefix}.attn.in_proj_{kind}", {})[part.removeprefix("self_attn.")[0]] = value
    for key, parts in qkv.items():
        if set(parts) == {"q", "k", "v"}:
            out[key] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return out


def clip_vit(
    spec: EncoderSpec,
    *,
    patch: int = 32,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    out_width: int = 512,
) -> ImageEncoder:
    """Build an image tower of CLIP; options as in :class:`ClipVision`."""
    backbone = ClipVision(
        image_px=spec.input_px or 224, patch=patch, width=width, depth=depth, heads=heads, out_width=out_width
    )
    return ImageEncoder(spec, backbone, width=out_width)
