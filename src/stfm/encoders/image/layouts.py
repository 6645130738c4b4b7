"""Public layouts of image encoders and how their names map to those used here (timm's, or the publisher's own)."""

from __future__ import annotations

from stfm.encoders.keymap import KeyMap

__all__ = ["CLIP_LAYOUTS", "DENSENET_LAYOUTS", "SWIN_LAYOUTS", "coca_layouts", "vit_layouts"]

_BLOCK, _LAYER, _OLD = "blocks.{n}", "layers.{n}", "encoder.layer.{n}"

#: module names of transformers 5 (ViTModel)
_TRANSFORMERS_5 = KeyMap(
    "transformers 5 ViTModel",
    sign=r"layers\.\d+\.attention\.q_proj\.weight",
    renames=(
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection.{k}", "patch_embed.proj.{k}"),
        (f"{_LAYER}.layernorm_before.{{k}}", f"{_BLOCK}.norm1.{{k}}"),
        (f"{_LAYER}.layernorm_after.{{k}}", f"{_BLOCK}.norm2.{{k}}"),
        (f"{_LAYER}.attention.o_proj.{{k}}", f"{_BLOCK}.attn.proj.{{k}}"),
        (f"{_LAYER}.mlp.fc1.{{k}}", f"{_BLOCK}.mlp.fc1.{{k}}"),
        (f"{_LAYER}.mlp.fc2.{{k}}", f"{_BLOCK}.mlp.fc2.{{k}}"),
        ("layernorm.{k}", "norm.{k}"),
    ),
    fused=(
        (tuple(f"{_LAYER}.attention.{one}_proj.{{k}}" for one in "qkv"), f"{_BLOCK}.attn.qkv.{{k}}"),
    ),
    dropped=(r"pooler\..+", r"classifier\..+", r"embeddings\.mask_token"),
)  # fmt: skip

#: names on the disk (transformers 4 and what 5 writes)
_TRANSFORMERS_4 = KeyMap(
    "transformers 4 ViTModel",
    sign=r"encoder\.layer\.\d+\.layernorm_before\.weight",
    renames=(
        *_TRANSFORMERS_5.renames[:3],
        (f"{_OLD}.layernorm_before.{{k}}", f"{_BLOCK}.norm1.{{k}}"),
        (f"{_OLD}.layernorm_after.{{k}}", f"{_BLOCK}.norm2.{{k}}"),
        (f"{_OLD}.attention.output.dense.{{k}}", f"{_BLOCK}.attn.proj.{{k}}"),
        (f"{_OLD}.intermediate.dense.{{k}}", f"{_BLOCK}.mlp.fc1.{{k}}"),
        (f"{_OLD}.output.dense.{{k}}", f"{_BLOCK}.mlp.fc2.{{k}}"),
        ("layernorm.{k}", "norm.{k}"),
    ),
    fused=(
        (
            tuple(f"{_OLD}.attention.attention.{one}.{{k}}" for one in ("query", "key", "value")),
            f"{_BLOCK}.attn.qkv.{{k}}",
        ),
    ),
    dropped=_TRANSFORMERS_5.dropped,
)

#: DINOv2 with registers as its authors and Hibou name it; the class token has a place in the table of positions
_DINOV2 = KeyMap(
    "DINOv2",
    sign=r"register_tokens|mask_token|blocks\.\d+\.mlp\.w12\.weight",
    renames=(
        ("register_tokens", "reg_token"),
        (f"{_BLOCK}.mlp.w12.{{k}}", f"{_BLOCK}.mlp.fc1.{{k}}"),
        (f"{_BLOCK}.mlp.w3.{{k}}", f"{_BLOCK}.mlp.fc2.{{k}}"),
    ),
    dropped=(r"mask_token", r"head\..+"),
)

#: the file of iBOT's training code (Phikon's original): the teacher, its prefix stripped, beside its projection heads
_IBOT = KeyMap(
    "iBOT",
    sign=r"backbone\..+|masked_embed",
    renames=(("backbone.{s}", "{s}"),),
    dropped=(r"(backbone\.)?head\d?\..+", r"(backbone\.)?masked_embed"),
)


def vit_layouts(*, registers: bool, gated: bool, scaled: bool, covers_cls: bool) -> tuple[KeyMap, ...]:
    """Return the layouts that a vision transformer may be published in.

    Parameters
    ----------
    registers, gated, scaled
        Whether it has registers, SwiGLU, LayerScale.
    covers_cls
        Whether the table of positions has a place for the class token. transformers' and DINOv2's always have one.
    """
    if not covers_cls:
        return (KeyMap("timm", dropped=(r"head\..+",)),)
    kinds = (_dinov2_transformers(gated=gated), _DINOV2) if scaled else (_TRANSFORMERS_5, _TRANSFORMERS_4)
    return (*kinds, *(() if registers else (_IBOT,)), KeyMap("timm", dropped=(r"head\..+",)))


def _dinov2_transformers(*, gated: bool) -> KeyMap:
    """Return the names of transformers' Dinov2Model and Dinov2WithRegistersModel, as they are on the disk."""
    first, second = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    return KeyMap(
        "transformers Dinov2",
        sign=r"encoder\.layer\.\d+\.layer_scale1\.lambda1",
        renames=(
            *_TRANSFORMERS_5.renames[:3],
            ("embeddings.register_tokens", "reg_token"),
            (f"{_OLD}.norm1.{{k}}", f"{_BLOCK}.norm1.{{k}}"),
            (f"{_OLD}.norm2.{{k}}", f"{_BLOCK}.norm2.{{k}}"),
            (f"{_OLD}.attention.output.dense.{{k}}", f"{_BLOCK}.attn.proj.{{k}}"),
            (f"{_OLD}.layer_scale1.lambda1", f"{_BLOCK}.ls1.gamma"),
            (f"{_OLD}.layer_scale2.lambda1", f"{_BLOCK}.ls2.gamma"),
            (f"{_OLD}.mlp.{first}.{{k}}", f"{_BLOCK}.mlp.fc1.{{k}}"),
            (f"{_OLD}.mlp.{second}.{{k}}", f"{_BLOCK}.mlp.fc2.{{k}}"),
            ("layernorm.{k}", "norm.{k}"),
        ),
        fused=_TRANSFORMERS_4.fused,
        dropped=(r"embeddings\.mask_token", r"classifier\..+"),
    )


_HF, _OURS = "vision_model.encoder.layers.{n}", "transformer.resblocks.{n}"

#: the image tower of a transformers CLIPModel (PLIP) and of openai's and open_clip's CLIP
CLIP_LAYOUTS = (
    KeyMap(
        "transformers CLIPModel",
        sign=r"vision_model\..+",
        renames=(
            ("vision_model.embeddings.class_embedding", "class_embedding"),
            ("vision_model.embeddings.patch_embedding.weight", "conv1.weight"),
            ("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("vision_model.pre_layrnorm.{k}", "ln_pre.{k}"),
            ("vision_model.post_layernorm.{k}", "ln_post.{k}"),
            ("visual_projection.weight", "proj"),
            (f"{_HF}.self_attn.out_proj.{{k}}", f"{_OURS}.attn.out_proj.{{k}}"),
            (f"{_HF}.layer_norm1.{{k}}", f"{_OURS}.ln_1.{{k}}"),
            (f"{_HF}.layer_norm2.{{k}}", f"{_OURS}.ln_2.{{k}}"),
            (f"{_HF}.mlp.fc1.{{k}}", f"{_OURS}.mlp.c_fc.{{k}}"),
            (f"{_HF}.mlp.fc2.{{k}}", f"{_OURS}.mlp.c_proj.{{k}}"),
        ),
        fused=((tuple(f"{_HF}.self_attn.{one}_proj.{{k}}" for one in "qkv"), f"{_OURS}.attn.in_proj_{{k}}"),),
        transposed=("proj",),
        dropped=(r"text_model\..+", r"text_projection\..+", "logit_scale", r"vision_model\.embeddings\.position_ids"),
    ),
    KeyMap("openai CLIP", sign=r"visual\..+", renames=(("visual.{s}", "{s}"),), dropped=(r"(?!visual\.).+",)),
)

#: Swin as first published: downsampling at the end of a stage, constant buffers in the file; timm 1 has it at the
#: start of the next stage
SWIN_LAYOUTS = (
    KeyMap(
        "Swin, original",
        sign=r"layers\.0\.downsample\..+",
        renames=tuple((f"layers.{i}.downsample.{{s}}", f"layers.{i + 1}.downsample.{{s}}") for i in range(3)),
        dropped=(r"head\..+", r".+\.attn_mask", r".+\.relative_position_index"),
    ),
    KeyMap("timm", dropped=(r"head\..+", r".+\.attn_mask", r".+\.relative_position_index")),
)

#: torchvision's files from before its layers were renamed carry a dot before the number
DENSENET_LAYOUTS = (
    KeyMap(
        "torchvision, first files",
        sign=r"features\.denseblock1\.denselayer1\.norm\.1\.weight",
        renames=tuple(
            (f"features.denseblock{{a}}.denselayer{{b}}.{part}.{{c}}.{{s}}",
             f"features.denseblock{{a}}.denselayer{{b}}.{part}{{c}}.{{s}}")
            for part in ("norm", "conv")
        ),
        dropped=(r"classifier\..+",),
    ),
    KeyMap("torchvision", dropped=(r"classifier\..+",)),
)  # fmt: skip


def coca_layouts(*, project: bool) -> tuple[KeyMap, ...]:
    """Return the layout of a CoCa checkpoint, of which the contrastive image tower is read.

    Parameters
    ----------
    project
        Whether the projection to the space of the text is read, too.
    """
    dropped: tuple[str, ...] = (r"(?!visual\.).+", r"visual\.(attn_pool_caption|ln_caption|head)\..+")
    if not project:
        dropped = (*dropped, r"visual\.proj_contrast")
    return (KeyMap("CoCa", sign=r"visual\.trunk\..+", renames=(("visual.{s}", "{s}"),), dropped=dropped),)
