"""Image encoders give what reference implementations give, in every public layout; stored numbers, and live ones.

``reference/make_image_reference.py`` made the stored numbers and says with what.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stfm.encoders import ImageEncoder, build_encoder

HERE = Path(__file__).resolve().parent / "reference"
FORMULA = runpy.run_path(str(HERE / "formula.py"))
STORED = json.loads((HERE / "image_features.json").read_text(encoding="utf-8"))

TWO = {"depth": 2}
# row -> (encoder, layout whose names the formula saw, options, side of the tiles)
CASES: dict[str, tuple[str, str | None, dict[str, Any], int]] = {
    "uni": ("uni", None, TWO, 224),
    "uni, stages": ("uni", None, {**TWO, "pooling": "stages", "stages": [0, 1]}, 224),
    "uni2": ("uni2", None, TWO, 224),
    "gigapath": ("gigapath", None, TWO, 256),
    "h-optimus-0": ("h-optimus-0", None, TWO, 224),
    "h0-mini": ("h0-mini", None, TWO, 224),
    "h0-mini, cls+mean": ("h0-mini", None, {**TWO, "pooling": "cls+mean"}, 224),
    "hibou-b": ("hibou-b", "transformers Dinov2", TWO, 224),
    "hibou-l": ("hibou-l", "transformers Dinov2", TWO, 224),
    "phikon": ("phikon", "transformers 4 ViTModel", TWO, 224),
    "clip": ("clip", "openai CLIP", TWO, 224),
    "plip": ("plip", "transformers CLIPModel", TWO, 224),
    "conch": ("conch", "CoCa", TWO, 448),
    "ctranspath": ("ctranspath", None, {}, 224),
    "resnet50": ("resnet50", None, {}, 224),
    "resnet50, stages": ("resnet50", None, {"pooling": "stages"}, 224),
    "densenet121": ("densenet121", None, {}, 224),
}


def published(encoder: ImageEncoder, layout: str | None) -> dict[str, torch.Tensor]:
    """Return weights by formula under the names of a layout."""
    state = encoder.published_state(layout)
    return {name: torch.from_numpy(FORMULA["value"](name, tuple(t.shape)).copy()) for name, t in state.items()}


def features(encoder: ImageEncoder, px: int) -> torch.Tensor:
    with torch.inference_mode():
        return encoder.eval()(torch.from_numpy(FORMULA["tiles"](px)))


def test_every_stored_row_is_compared():
    assert set(CASES) == set(STORED["features"])
    assert set(STORED["versions"]) == {"torch", "timm", "transformers", "open_clip_torch", "torchvision"}


@pytest.mark.parametrize("row", CASES)
def test_features_of_the_reference_implementation(row: str):
    name, layout, options, px = CASES[row]
    encoder = build_encoder(name, options=options)
    encoder.load_weights(published(encoder, layout))
    found = features(encoder, px)
    assert found.shape == (2, STORED["widths"][row])
    expected = np.array(STORED["features"][row])
    np.testing.assert_allclose(FORMULA["kept"](found.numpy()), expected, rtol=2e-4, atol=2e-4 * expected.std())


@pytest.mark.parametrize("name", ["phikon", "hibou-b", "plip", "ctranspath", "densenet121", "conch"])
def test_every_layout_gives_the_same_features(name: str):
    """Weights written in each layout that is read come back as they were, beside what a file holds besides."""
    options = {
        "ctranspath": {"width": 16, "depths": [2, 2, 2, 2], "heads": [1, 2, 2, 4]},
        "densenet121": {"growth": 8, "depths": [1, 2, 2, 1], "first": 16},
        "conch": {"width": 32, "depth": 2, "heads": 4, "out_width": 16, "input_px": 64},
    }.get(name, {"width": 32, "depth": 2, "heads": 4})
    torch.manual_seed(0)
    encoder = build_encoder(name, options=options)
    besides = {
        "iBOT": {"backbone.masked_embed": torch.zeros(1, 32), "head.mlp.0.weight": torch.zeros(3, 3)},
        "DINOv2": {"mask_token": torch.zeros(1, 32)},
        "transformers 4 ViTModel": {"pooler.dense.weight": torch.zeros(32, 32)},
        "transformers CLIPModel": {"text_model.final_layer_norm.weight": torch.zeros(3), "logit_scale": torch.ones(())},
        "openai CLIP": {"token_embedding.weight": torch.zeros(3, 3), "logit_scale": torch.ones(())},
        "Swin, original": {
            "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
            "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
            "head.weight": torch.zeros(3, 3),
        },
        "CoCa": {"text.cls_emb": torch.zeros(3), "visual.attn_pool_caption.query": torch.zeros(2, 3)},
        "torchvision": {"classifier.weight": torch.zeros(250, 3)},
        "timm": {"head.bias": torch.zeros(3)},
    }
    assert len(encoder.layouts) >= (1 if name == "conch" else 2)
    for layout in encoder.layouts:
        state = {**encoder.published_state(layout), **besides.get(layout, {})}
        torch.manual_seed(1)
        other = build_encoder(name, options=options, weights=state)
        torch.testing.assert_close(other.backbone.state_dict(), encoder.backbone.state_dict())


@pytest.mark.parametrize("row", ["hibou-b", "phikon"])
def test_original_names_give_the_features_of_transformers(row: str):
    name, layout, options, _ = CASES[row]
    first = build_encoder(name, options=options)
    first.load_weights(published(first, layout))
    original = "DINOv2" if row == "hibou-b" else "iBOT"
    second = build_encoder(name, options=options, weights=first.published_state(original))
    assert second.fingerprint() == first.fingerprint()


# -- live, where the libraries are -------------------------------------------------------------------------------------


def timm_or_skip() -> Any:
    """Import timm; a broken torchvision beside it is no reason to fail."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm is not here, or cannot be imported: {error}")
    return timm


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("uni", "vit_large_patch16_224"), ("resnet50", "resnet50"), ("densenet121", "densenet121")],
)
def test_equal_to_timm_live(ours: str, theirs: str):
    timm = timm_or_skip()
    options = {"depth": 2} if ours == "uni" else {}
    extra = {"depth": 2, "init_values": 1e-5} if ours == "uni" else {}
    torch.manual_seed(0)
    model = timm.create_model(theirs, num_classes=0, **extra).eval()
    encoder = build_encoder(ours, options=options, weights=model.state_dict()).eval()
    with torch.inference_mode():
        x = encoder.prepare(torch.from_numpy(FORMULA["tiles"](224)))
        torch.testing.assert_close(encoder.backbone(x), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pooling", ["own", "stages"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_any_model_of_timm(pooling: str):
    timm = timm_or_skip()
    encoder = build_encoder("timm:resnet18", options={"pooling": pooling}).eval()
    assert encoder.frozen
    assert encoder.spec.input_px == 224
    assert encoder.width == (512 if pooling == "own" else 2 * (64 + 64 + 128 + 256 + 512))
    model = timm.create_model("resnet18")
    encoder.load_weights(model.state_dict())  # its classifier is dropped
    assert features(encoder, 224).shape == (2, encoder.width)


def test_phikon_is_transformers_vit_live():
    transformers = pytest.importorskip("transformers", reason="transformers is not here")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=224
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    options = {"width": 48, "depth": 2, "heads": 4}
    encoder = build_encoder("phikon", options=options, weights=dict(model.state_dict())).eval()
    with torch.inference_mode():
        x = encoder.prepare(torch.from_numpy(FORMULA["tiles"](224)))
        torch.testing.assert_close(encoder.backbone(x), model(x).last_hidden_state[:, 0], atol=1e-4, rtol=1e-3)
