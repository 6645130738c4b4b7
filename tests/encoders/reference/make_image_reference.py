"""Features of reference implementations with weights by formula -> ``image_features.json``.

Run in an environment of its own, with timm, transformers, open_clip and torchvision beside torch::

    python tests/encoders/reference/make_image_reference.py

Where torchvision is a build for CUDA and torch one for the CPU, its operators are declared before it is imported.
Transformers are cut to two blocks; what is compared does not change with depth.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import formula  # noqa: E402

OUT = HERE / "image_features.json"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)


def declare_operators() -> None:
    """Declare the operators that torchvision's compiled part would bring; none of them is called."""
    found = importlib.util.find_spec("torchvision")
    source = Path(found.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "FRAGMENT")
    declare_operators.keep = library
    names = set(re.findall(r"torchvision::(\w+)", source)) | set(re.findall(r"@register_meta\(\"(\w+)\"\)", source))
    for name in sorted(names | {"nms", "_cuda_version"}):
        library.define(f"{name}(Tensor x) -> Tensor")


def fill(model: nn.Module, prefix: str = "") -> nn.Module:
    """Give a model the weights of the formula, under its own names."""
    state = {
        name: torch.from_numpy(formula.value(prefix + name, tuple(tensor.shape)).copy())
        for name, tensor in model.state_dict().items()
        if "relative_position_index" not in name and "attn_mask" not in name and "position_ids" not in name
    }
    model.load_state_dict(state, strict=False)
    return model.eval()


def shown(px: int, statistics: tuple, crop: int | None = None) -> Tensor:
    """Return the tiles as a model reads them."""
    x = torch.from_numpy(formula.tiles(px)).float() / 255
    if crop is not None:
        start = (px - crop) // 2
        x = x[..., start : start + crop, start : start + crop]
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in statistics)
    return (x - mean) / std


def swiglu(name: str, **arguments) -> nn.Module:
    """Return a vision transformer of timm with SwiGLU, two blocks."""
    import timm

    return timm.create_model(
        name, img_size=224, depth=2, init_values=1e-5, num_classes=0, mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=nn.SiLU, **arguments,
    )  # fmt: skip


def timm_vits() -> dict[str, Tensor]:
    """Return the features of the encoders that are published in timm's layout."""
    import timm

    x, optimus = shown(224, IMAGENET), shown(224, OPTIMUS)
    uni = fill(timm.create_model("vit_large_patch16_224", depth=2, init_values=1e-5, num_classes=0))
    uni2 = swiglu(
        "vit_giant_patch14_224", embed_dim=1536, num_heads=24, mlp_ratio=2.66667 * 2, no_embed_class=True,
        reg_tokens=8,
    )  # fmt: skip
    gigapath = swiglu("vit_giant_patch14_dinov2", patch_size=16, mlp_ratio=5.33334)
    optimus_0 = swiglu("vit_giant_patch14_reg4_dinov2", mlp_ratio=5.33334)
    mini = fill(swiglu("vit_base_patch14_reg4_dinov2", mlp_ratio=5.33334))
    tokens = mini.forward_features(optimus)
    out = {
        "uni": uni(x),
        "uni2": fill(uni2)(x),
        "gigapath": fill(gigapath)(shown(256, IMAGENET, crop=224)),
        "h-optimus-0": fill(optimus_0)(optimus),
        "h0-mini": tokens[:, 0],
        "h0-mini, cls+mean": torch.cat([tokens[:, 0], tokens[:, mini.num_prefix_tokens :].mean(1)], dim=1),
    }
    maps = uni.forward_intermediates(x, indices=[0, 1], norm=False, intermediates_only=True)
    out["uni, stages"] = moments(maps)
    return out


def moments(maps: list[Tensor]) -> Tensor:
    """Return mean and deviation of maps, side by side."""
    return torch.cat([torch.cat([m.mean((2, 3)), m.std((2, 3), correction=0)], dim=1) for m in maps], dim=1)


def transformers_vits() -> dict[str, Tensor]:
    """Return the features of the encoders that are published for transformers."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTModel,
    )

    out = {}
    for name, width, heads in (("hibou-b", 768, 12), ("hibou-l", 1024, 16)):
        config = Dinov2WithRegistersConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, image_size=224, patch_size=14,
            num_register_tokens=4, use_swiglu_ffn=True,
        )  # fmt: skip
        model = fill_as_on_disk(Dinov2WithRegistersModel(config))
        out[name] = model(shown(224, HIBOU)).pooler_output
    model = fill_as_on_disk(ViTModel(ViTConfig(num_hidden_layers=2), add_pooling_layer=False))
    out["phikon"] = model(shown(224, IMAGENET)).last_hidden_state[:, 0]
    config = CLIPVisionConfig(num_hidden_layers=2, patch_size=32, projection_dim=512)
    out["plip"] = fill_as_on_disk(CLIPVisionModelWithProjection(config))(shown(224, OPENAI)).image_embeds
    return out


def fill_as_on_disk(model: nn.Module) -> nn.Module:
    """Give a model of transformers the weights of the formula, under the names that it writes to the disk."""
    from tempfile import TemporaryDirectory

    from safetensors.torch import load_file, save_file

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        names = {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
        state = {name: torch.from_numpy(formula.value(name, shape).copy()) for name, shape in names.items()}
        save_file(state, file, metadata={"format": "pt"})
        return type(model).from_pretrained(folder, **extra(model)).eval()


def extra(model: nn.Module) -> dict[str, bool]:
    """Return what a class has to be told beside its configuration."""
    return {"add_pooling_layer": False} if type(model).__name__ == "ViTModel" else {}


def clip_and_conch() -> dict[str, Tensor]:
    """Return the features of CLIP and of CONCH's image tower."""
    import timm
    from open_clip.transformer import AttentionalPooler, QuickGELU, VisionTransformer

    clip = VisionTransformer(
        image_size=224, patch_size=32, width=768, layers=2, heads=12, mlp_ratio=4.0, output_dim=512,
        act_layer=QuickGELU,
    )  # fmt: skip
    trunk = timm.create_model("vit_base_patch16_224", img_size=448, depth=2, num_classes=0)
    conch = nn.ModuleDict(
        {"trunk": trunk, "attn_pool_contrast": AttentionalPooler(512, 768, 8, 1), "ln_contrast": nn.LayerNorm(512)}
    )
    fill(conch, "visual.")
    tokens = trunk.forward_features(shown(448, IMAGENET))
    pooled = conch["ln_contrast"](conch["attn_pool_contrast"](tokens)[:, 0])
    return {"clip": fill(clip, "visual.")(shown(224, OPENAI)), "conch": pooled}


class Stem(nn.Module):
    """CTransPath's stem, written from its description, in the place of the patches of timm's Swin."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 12), (12, 24)):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(24, 96, 1))
        self.norm = nn.LayerNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, h, w, d)``."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def convolutions() -> dict[str, Tensor]:
    """Return the features of Swin behind a stem, of ResNet-50 and of DenseNet-121."""
    import timm
    import torchvision

    x = shown(224, IMAGENET)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    swin.patch_embed = Stem()
    resnet = fill(timm.create_model("resnet50", num_classes=0))
    dense = fill(torchvision.models.densenet121(weights=None))
    stages = list(resnet.forward_intermediates(x, intermediates_only=True))[1:]
    return {
        "ctranspath": fill(swin)(x),
        "resnet50": resnet(x),
        "resnet50, stages": moments(stages),
        "densenet121": torch.relu(dense.features(x)).mean((2, 3)),
    }


def main() -> None:
    """Compute and write."""
    torch.set_num_threads(1)
    declare_operators()
    with torch.inference_mode():
        found = {**timm_vits(), **transformers_vits(), **clip_and_conch(), **convolutions()}
    packages = ("torch", "timm", "transformers", "open_clip_torch", "torchvision")
    features = {
        name: [[float(f"{v:.6g}") for v in row] for row in formula.kept(one.numpy())] for name, one in found.items()
    }
    widths = {name: one.shape[1] for name, one in found.items()}
    record = {"versions": {p: version(p) for p in packages}, "widths": widths, "features": features}
    OUT.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{OUT}: {len(found)} rows, {OUT.stat().st_size} bytes")  # noqa: T201
    for name, one in found.items():
        print(name, tuple(one.shape), float(one.std()))  # noqa: T201


if __name__ == "__main__":
    main()
