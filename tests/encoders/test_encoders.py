"""Every registered encoder goes through the same tests; then what is particular to each family."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stfm._errors import DataIntegrityError, InputError, MissingKeyError, WrongTypeError
from stfm.encoders import ENCODERS, EncoderSpec, GeneEncoder, ImageEncoder, build_encoder, list_encoders
from stfm.encoders.gene.scgpt import bin_values
from stfm.encoders.image.handcrafted import N_FEATURES
from stfm.encoders.image.mobilenet import SameConv
from stfm.slide.genes import Vocabulary

G = 40
# The published sizes are built on the meta device; here each runs with a body cut short.
SHORT = {
    "ae-img": {"depths": [1, 1, 1, 1], "widths": [8, 16, 16, 16]},
    "uni": {"width": 32, "depth": 2, "heads": 4},
    "uni2": {"width": 32, "depth": 2, "heads": 4, "hidden": 48},
    "gigapath": {"width": 32, "depth": 2, "heads": 4, "hidden": 48},
    "hibou-b": {"width": 32, "depth": 2, "heads": 4, "hidden": 48},
    "hibou-l": {"width": 32, "depth": 2, "heads": 4, "hidden": 48},
    "h-optimus-0": {"width": 32, "depth": 2, "heads": 4, "hidden": 48},
    "h0-mini": {"width": 32, "depth": 2, "heads": 4, "hidden": 48},
    "phikon": {"width": 32, "depth": 2, "heads": 4},
    "ctranspath": {"width": 16, "depths": [2, 2, 2, 2], "heads": [1, 2, 2, 4]},
    "conch": {"input_px": 64, "width": 32, "depth": 2, "heads": 4, "out_width": 16},
    "clip": {"width": 32, "depth": 2, "heads": 4, "out_width": 16},
    "plip": {"width": 32, "depth": 2, "heads": 4, "out_width": 16},
    "resnet50": {"depths": [1, 1, 1, 1], "widths": [8, 16, 16, 16]},
    "densenet121": {"growth": 8, "depths": [1, 2, 2, 1], "first": 16},
    "scgpt": {"n_ids": 60, "width": 32, "depth": 2, "heads": 4, "hidden": 32},
    "scfoundation": {"n_table": 60, "width": 32, "depth": 2, "heads": 4, "n_bins": 7},
    "novae": {"width": 12, "hidden": 16, "depth": 2, "heads": 4, "out_width": 8, "prototypes": 5, "histology": 3},
    "ae-gene": {"width": 32, "depth": 2, "heads": 4, "n_tokens": 6},
    "pca": {"width": 8},
}
NAMES = ENCODERS.names()
IMAGES = [n for n in NAMES if ENCODERS.get(n).modality == "image"]
GENES = [n for n in NAMES if ENCODERS.get(n).modality == "gene"]


def make(name: str, **kwargs):
    torch.manual_seed(0)
    return build_encoder(name, n_genes=G, options=SHORT.get(name), **kwargs)


def example(name: str, n: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if ENCODERS.get(name).modality == "image":
        px = 224 if name == "mobilenetv2" else 28
        return torch.randint(0, 256, (n, 3, px, px), generator=generator, dtype=torch.uint8)
    x = 3 * torch.rand(n, G, generator=generator)
    return x * (torch.rand(n, G, generator=generator) > 0.5)


def test_table():
    table = list_encoders()
    assert list(table.index) == NAMES
    assert {"width", "parameters", "licence", "gated"} <= set(table.columns)
    assert set(list_encoders("gene").index) == set(GENES)


@pytest.mark.parametrize("name", NAMES)
def test_row_agrees_with_what_is_built(name: str):
    spec = ENCODERS.get(name)
    with torch.device("meta"):
        encoder = build_encoder(name, n_genes=2000)
    assert encoder.width == spec.width
    n_parameters = sum(p.numel() for p in encoder.parameters())
    if spec.parameters is not None:
        assert n_parameters == spec.parameters
    assert encoder.mode == spec.mode
    assert encoder.frozen == (spec.mode == "frozen")
    assert any(p.requires_grad for p in encoder.parameters()) == (not encoder.frozen and n_parameters > 0)


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_batch_size(name: str):
    encoder, x = make(name).eval(), example(name)
    with torch.no_grad():
        whole = encoder(x)
        parts = torch.cat([encoder(x[:1]), encoder(x[1:4]), encoder(x[4:])])
    assert whole.shape == (6, encoder.width)
    assert whole.dtype == torch.float32
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_spots_may_come_in_any_order(name: str):
    encoder, x = make(name).eval(), example(name)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        torch.testing.assert_close(encoder(x[order]), encoder(x)[order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_seeded_and_told_apart_by_fingerprint(name: str):
    first, second = make(name), make(name)
    assert first.fingerprint() == second.fingerprint()
    tensor = next((t for t in first.state_dict().values() if t.is_floating_point()), None)
    if tensor is not None:
        tensor.view(-1)[0] += 1.0
        assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_frozen_stays_as_it_is(name: str):
    encoder, x = make(name, mode="frozen").train(), example(name)
    assert not encoder.backbone.training
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    out = encoder(x)
    assert not out.requires_grad
    torch.testing.assert_close(encoder.state_dict(), before)


@pytest.mark.parametrize("name", ["uni", "scgpt", "ae-gene", "ae-gene-small", "gene-mlp"])
def test_lora_trains_little(name: str):
    encoder = make(name, mode="lora", lora_rank=2).train()
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    encoder(example(name)).sum().backward()
    with pytest.raises(InputError, match="build it again"):
        encoder.set_mode("full")


@pytest.mark.parametrize("name", ["resnet-small", "cnn-tiny", "mobilenetv2"])
def test_float_tiles_are_uint8_over_255(name: str):
    encoder, x = make(name).eval(), example(name, 2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x.float() / 255), encoder(x))


@pytest.mark.parametrize("grad", [True, False])
def test_float_tiles_in_0_to_255_are_refused(grad: bool):
    encoder, tiles = make("cnn-tiny").eval(), example("cnn-tiny")
    own = build_encoder(torch.nn.Flatten(), options={"input_px": 28, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with torch.set_grad_enabled(grad):
        for one in (encoder, own):
            for given in (tiles.float(), tiles.half()):
                with pytest.raises(InputError, match=r"must lie in 0\.\.1, and these reach 255; give uint8 tiles"):
                    one(given)
            with pytest.raises(InputError, match="divide them by 255"):
                one.prepare(tiles.float())
            one(1.2 * tiles / 255)  # what augmentation may come to
            one(tiles[:0] / 255)


def test_a_compiled_encoder_does_not_look_at_values():
    encoder, tiles = make("cnn-tiny").eval(), example("cnn-tiny") / 255
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)  # which refuses a graph that breaks
    torch.testing.assert_close(compiled(tiles), encoder(tiles))


def test_other_sizes_are_resized():
    encoder = make("uni").eval()
    assert encoder(torch.full((1, 3, 40, 40), 200, dtype=torch.uint8)).shape == (1, 32)
    white = encoder.prepare(torch.full((1, 3, 100, 100), 255, dtype=torch.uint8))
    assert white.shape == (1, 3, 224, 224)
    torch.testing.assert_close(white[0, :, 5, 5], (1 - torch.tensor([0.485, 0.456, 0.406])) / encoder.std.flatten())


def test_stems_and_norms_of_residual_networks():
    small = {"block": "basic", "depths": [1, 1], "widths": [8, 16]}
    for stem in ("imagenet", "cifar"):
        encoder = build_encoder("ae-img", options={**small, "stem": stem, "norm": "group"})
        assert encoder(example("ae-img", 2)).shape == (2, 16)
        assert not any("BatchNorm" in type(m).__name__ for m in encoder.modules())
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make("ae-img"))
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules())


# -- published layouts -------------------------------------------------------------------------------------------------


def listed_shapes(path: Path, heading: str) -> dict[str, list[int]]:
    """Names and shapes of a listing in shared/weights; ``N`` stands for every layer."""
    lines = path.read_text().split(f"### {heading}")[1].split("###")[0].splitlines()[1:]
    shapes = {}
    for line in filter(None, lines):
        name, shape = re.match(r"(\S+).*?(\[.*\])", line).groups()  # type: ignore[union-attr]
        count = re.search(r" x(\d+) ", line)
        for i in range(int(count[1]) if count else 1):
            shapes[name.replace(".N.", f".{i}.")] = json.loads(shape)
    return shapes


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "weights"
    if not folder.is_dir():
        pytest.skip("the folder of encoder facts, ../shared/weights, is not here")
    return folder


def test_uni_has_the_published_layout(weights_folder: Path):
    with torch.device("meta"):
        encoder = build_encoder("uni")
    listed = listed_shapes(weights_folder / "encoder_shapes_timm.txt", "UNI:")
    assert {k: list(v.shape) for k, v in encoder.backbone.state_dict().items()} == listed
    assert len(listed) == 342


def test_plip_reads_the_transformers_layout(weights_folder: Path):
    with torch.device("meta"):
        encoder = build_encoder("plip")
    listed = listed_shapes(weights_folder / "encoder_shapes_hf.txt", "HF CLIPModel B/32 (PLIP):")
    state = {name: torch.empty(shape, device="meta") for name, shape in listed.items()}
    layout = next(one for one in encoder.backbone.layouts if one.matches(state))
    converted = layout.read(state)
    own = encoder.backbone.state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in own.items()}


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Openai's names -> transformers' (the other way of what the encoder does)."""
    top = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    parts = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    out = {"logit_scale": torch.zeros(()), "text_projection.weight": torch.zeros(2, 2)}
    for key, value in state.items():
        if key == "proj":
            out["visual_projection.weight"] = value.T
        elif key in top:
            out[f"vision_model.{top[key]}"] = value
        else:
            number, part, kind = re.match(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$", key).groups()  # type: ignore[union-attr]
            prefix = f"vision_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for name, block in zip("qkv", value.chunk(3), strict=True):
                    out[f"{prefix}.self_attn.{name}_proj.{kind}"] = block
            else:
                out[f"{prefix}.{parts[part]}.{kind}"] = value
    return out


def test_clip_layouts_give_the_same_tower():
    reference = make("clip").eval()
    state = reference.backbone.state_dict()
    openai = {f"visual.{k}": v for k, v in state.items()} | {"logit_scale": torch.zeros(())}
    x = example("clip", 2)
    for layout in (openai, to_transformers(state)):
        encoder = build_encoder("plip", options=SHORT["plip"], weights=layout).eval()
        torch.testing.assert_close(encoder(x), reference(x))


def test_scgpt_reads_flash_attention_names_and_drops_heads():
    reference = make("scgpt")
    state = {
        k.replace("self_attn.in_proj_", "self_attn.Wqkv."): v
        for k, v in reference.backbone.state_dict().items()
        if not k.endswith("_ids")
    }
    state |= {"decoder.fc.0.weight": torch.zeros(1), "cls_decoder.out_layer.bias": torch.zeros(1)}
    encoder = make("scgpt", weights=state).eval()
    torch.testing.assert_close(encoder(example("scgpt")), reference.eval()(example("scgpt")))


def test_wrong_checkpoints_are_refused(tmp_path: Path):
    encoder = make("uni")
    state = dict(encoder.backbone.state_dict())
    state["pos_embed"] = torch.zeros(1, 5, 32)
    del state["norm.weight"]
    with pytest.raises(DataIntegrityError, match=r"1 missing \(norm.weight\); 1 of another shape \(pos_embed\)"):
        encoder.load_weights(state)
    with pytest.raises(MissingKeyError, match="no weights file"):
        encoder.load_weights(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(DataIntegrityError, match="not a readable safetensors"):
        encoder.load_weights(tmp_path / "broken.safetensors")
    torch.save({"code": np.random.default_rng}, tmp_path / "code.pt")
    with pytest.raises(DataIntegrityError, match="cannot be opened safely"):
        encoder.load_weights(tmp_path / "code.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float):
    encoder = make("uni")
    before = encoder.fingerprint()
    state = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
    state["norm.bias"][3] = value
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DataIntegrityError, match=r"w\.pt holds weights that are NaN or infinite, 'norm.bias' first"):
        encoder.load_weights(tmp_path / "w.pt")
    assert encoder.fingerprint() == before


@pytest.mark.parametrize("wrapped", ["model", None])
def test_pytorch_files_open_safely(tmp_path: Path, wrapped: str | None):
    reference = make("gene-mlp")
    state = {f"module.{k}": v for k, v in reference.backbone.state_dict().items()}
    torch.save({wrapped: state} if wrapped else state, tmp_path / "weights.pt")
    torch.manual_seed(5)
    encoder = build_encoder("gene-mlp", n_genes=G, weights=tmp_path / "weights.pt")
    assert encoder.fingerprint() == reference.fingerprint()


def test_mobilenetv2_on_its_release(weights_folder: Path):
    path = weights_folder / "mobilenetv2" / "mobilenet_v2_float.safetensors"
    if not path.exists():
        pytest.skip("the weights of MobileNetV2 are not here")
    encoder = build_encoder("mobilenetv2", weights=path, options={"classifier": True}).eval()
    assert encoder.width == 1992
    yy, xx = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    ball = ((yy - 112) ** 2 + (xx - 112) ** 2 < 70**2).to(torch.uint8)
    tile = torch.stack([60 + 180 * ball, 60 + 60 * ball, 60 - 40 * ball]).unsqueeze(0)
    with torch.no_grad():
        x = encoder.prepare(tile)
        assert float(x.max()) == pytest.approx(240 / 127.5 - 1, abs=1e-5)
        chance = encoder.backbone.classify(x).softmax(-1)
        features = build_encoder("mobilenetv2", weights=path).eval()(tile)
    assert float(chance.max()) > 0.1  # a thousand classes: the network is sure of something
    assert int(chance.argmax()) != 0  # and it is no background
    assert torch.isfinite(features).all()
    assert float(features[:, -1280:].min()) >= 0.0
    assert float(features[:, -1280:].max()) <= 6.0


@pytest.mark.parametrize(("size", "stride", "expected"), [(224, 2, (0, 1)), (7, 2, (1, 1)), (14, 1, (1, 1))])
def test_tensorflow_padding(size: int, stride: int, expected: tuple[int, int]):
    assert SameConv(3, 3, kernel=3, stride=stride)._padding(size) == expected


# -- handcrafted -------------------------------------------------------------------------------------------------------


def test_handcrafted_features_mean_something():
    encoder = build_encoder("handcrafted").eval()
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    pink = white.clone()
    pink[:, 1] = 110
    noisy = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    flat_white, flat_pink, rough = (encoder(t)[0] for t in (white, pink, noisy))
    assert flat_white.shape == (N_FEATURES,)
    torch.testing.assert_close(flat_white[:3], torch.ones(3))
    torch.testing.assert_close(flat_pink[1], torch.tensor(110 / 255))
    assert float(flat_white[30]) < 0.1 < 0.9 < float(flat_pink[30])  # share of tissue
    assert (rough[33:45] > flat_pink[33:45] + 0.005).all()  # gradients
    assert torch.isfinite(torch.stack([flat_white, flat_pink, rough])).all()
    odd = noisy[..., :63, :63]  # below 64 px no pixel is left out
    torch.testing.assert_close(encoder(odd.flip(-1)), encoder(odd), atol=2e-2, rtol=5e-2)


def test_handcrafted_needs_eight_pixels_and_takes_any_more():
    encoder = build_encoder("handcrafted")
    for size in (8, 13, 57):
        assert torch.isfinite(encoder(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))).all()
    with pytest.raises(InputError, match="at least 8 px"):
        encoder(torch.zeros(1, 3, 7, 7, dtype=torch.uint8))


def test_handcrafted_is_not_rounded_by_mixed_precision():
    encoder, x = build_encoder("handcrafted"), example("handcrafted")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder(x), encoder(x.clone()).float())
        mixed = encoder(x)
    torch.testing.assert_close(mixed, encoder(x))


# -- genes -------------------------------------------------------------------------------------------------------------


def low_rank(n: int = 200, rank: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, rank, generator=generator) * torch.tensor([5.0, 3.0, 2.0])[:rank]
    return scores @ torch.randn(rank, G, generator=generator) + 0.05 * torch.randn(n, G, generator=generator) + 1


def test_pca_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = low_rank()
    encoder = build_encoder("pca", n_genes=G, options={"width": 3, "whiten": False}).fit(x)
    reference = PCA(3, svd_solver="full").fit(x.numpy())
    ours, theirs = encoder(x).numpy(), reference.transform(x.numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=2e-3)
    white = build_encoder("pca", n_genes=G, options={"width": 3}).fit(x)(x)
    torch.testing.assert_close(white.std(dim=0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    again = build_encoder("pca", n_genes=G, options={"width": 3}).fit(x)
    assert again.fingerprint() == build_encoder("pca", n_genes=G, options={"width": 3}).fit(x).fingerprint()


def test_pca_solves_for_missing_genes():
    x = low_rank()
    encoder = build_encoder("pca", n_genes=G, options={"width": 3}).fit(x)
    mask = torch.ones(200, G, dtype=torch.bool)
    mask[:100, ::3] = False
    mask[100:, 1::2] = False
    scores = encoder(x * mask, mask)
    zeros_taken_for_values = encoder(x * mask)
    whole = encoder(x)
    assert float((scores - whole).abs().mean()) < 0.1
    assert float((zeros_taken_for_values - whole).abs().mean()) > 0.3
    torch.testing.assert_close(encoder(x, torch.ones(G, dtype=torch.bool)), whole)


def test_pca_with_fewer_spots_than_components():
    encoder = build_encoder("pca", n_genes=G, options={"width": 16}).fit(low_rank(5))
    out = encoder(low_rank(5))
    assert out.shape == (5, 16)
    assert torch.isfinite(out).all()
    mask = torch.arange(G) % 2 == 0
    assert torch.isfinite(encoder(low_rank(5), mask)).all()
    with pytest.raises(InputError, match="at least two training spots"):
        encoder.fit(low_rank(1))


@pytest.mark.parametrize("name", ["gene-mlp", "ae-gene-small", "pca"])
def test_scales_are_taken_from_measured_values_only(name: str):
    x = low_rank()
    mask = torch.ones(200, G, dtype=torch.bool)
    mask[:150, 0] = False
    mask[:, 1] = False
    encoder = make(name).fit(torch.where(mask, x, 99.0), mask)
    scaler = encoder.backbone.scaler
    torch.testing.assert_close(scaler.mean[0], x[150:, 0].mean(), atol=1e-5, rtol=1e-5)
    assert float(scaler.mean[1]) == 0.0
    with torch.no_grad():
        out = encoder.eval()(torch.where(mask, x, 99.0), mask)
        torch.testing.assert_close(out, encoder(torch.where(mask, x, -5.0), mask))  # what was not measured is not read


@pytest.mark.parametrize("tokens", ["chunks", "genes", "single"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_tokens_of_ae_gene(tokens: str, pooling: str):
    options = {"width": 16, "depth": 1, "heads": 2, "n_tokens": 7, "tokens": tokens, "pooling": pooling}
    encoder = build_encoder("ae-gene", n_genes=G, options=options).eval()
    x = example("ae-gene")
    x[0] = 0.0  # a spot without counts
    out = encoder(x)
    assert out.shape == (6, 16)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out[1], out[2])


def test_scgpt_is_a_unit_vector_of_the_expressed_genes(tmp_path: Path):
    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps({f"G{i}": i + 3 for i in range(30)} | {"<pad>": 0, "<cls>": 1, "<eoc>": 2}))
    options = {**SHORT["scgpt"], "vocab": str(vocab)}
    torch.manual_seed(0)
    encoder = build_encoder("scgpt", n_genes=G, options=options).eval()
    encoder.bind(Vocabulary(np.array([f"g{i}" for i in range(G)])))
    assert encoder.backbone.special_ids.tolist() == [0, 1]
    assert encoder.backbone.gene_ids.tolist() == [*range(3, 33), *[-1] * 10]
    x = example("scgpt")
    out = encoder(x)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(6))
    unknown = x.clone()
    unknown[:, 30:] = 7.0
    torch.testing.assert_close(encoder(unknown), out)
    torch.testing.assert_close(encoder(2 * x), out)  # binned: depth does not matter
    mask = torch.ones(G, dtype=torch.bool)
    mask[:5] = False
    assert not torch.allclose(encoder(x, mask), out)
    assert torch.isfinite(encoder(torch.zeros(1, G))).all()
    with pytest.raises(InputError, match="set option n_ids"):
        build_encoder("scgpt", n_genes=G, options={**options, "n_ids": 20}).bind(Vocabulary(np.array(["G1"])))


def test_bins_are_quantiles_of_the_expressed_values():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 0.0], [0.0, 0.0, 5.0, 0.0, 0.0, 0.0], [0.0] * 6])
    bins = bin_values(x, 5)  # edges at 0, 1/3, 2/3, 1 of the values 1..4
    assert bins[0].tolist() == [0, 1, 2, 3, 4, 0]
    assert bins[1].tolist() == [0, 0, 4, 0, 0, 0]
    assert bins[2].tolist() == [0] * 6
    row = example("scgpt", 3)
    expected = []
    for values in row.numpy():
        positive = values[values > 0]
        edges = np.quantile(positive, np.linspace(0, 1, 50))
        expected.append(np.where(values > 0, np.digitize(values, edges), 0))
    difference = np.abs(bin_values(row, 51).numpy() - np.stack(expected))
    assert difference.max() <= 1  # an edge met within rounding
    assert difference.mean() < 0.05


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_wrong_names_and_options():
    with pytest.raises(MissingKeyError, match="no encoder 'unii'. Did you mean 'uni'"):
        build_encoder("unii")
    with pytest.raises(InputError, match="no option 'depht'. Did you mean 'depth'"):
        build_encoder("uni", options={"depht": 3})
    with pytest.raises(InputError, match="needs n_genes"):
        build_encoder("pca")
    with pytest.raises(InputError, match="mode='freeze' is unknown"):
        build_encoder("cnn-tiny", mode="freeze")
    with pytest.raises(WrongTypeError, match="An encoder is a name"):
        build_encoder(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("uni", {"depth": 0}, "Encoder 'uni': depth must be at least 1, got 0"),
        ("uni", {"heads": 0}, "Encoder 'uni': heads must be at least 1"),
        ("uni", {"heads": 5}, "width of heads: 224, 16, 32, 5"),
        ("uni", {"hidden": 0}, "Encoder 'uni': hidden must be at least 1"),
        ("uni", {"registers": -1}, "Encoder 'uni': registers must be at least 0"),
        ("uni", {"pooling": "stages", "stages": 1}, "stages must be positions of the 2 stages"),
        ("uni", {"pooling": "stages", "stages": [0.5]}, "stages must be positions of the 2 stages"),
        ("uni", {"input_px": 224.5}, "Encoder 'uni': input_px must be an integer, got float"),
        ("gigapath", {"input_px": 448}, "Encoder 'gigapath': resize_px must be at least 448, got 256"),
        ("uni", {"mpp": 0.0}, "Encoder 'uni': mpp must be a finite number greater than 0"),
        ("ctranspath", {"heads": [1, 3, 2, 4]}, r"heads must divide .* \[16, 32, 64, 128\], got \[1, 3, 2, 4\]"),
        ("ctranspath", {"window": 0}, "Encoder 'ctranspath': window must be at least 1"),
        ("ctranspath", {"depths": 2}, "Encoder 'ctranspath': depths must be a list of whole numbers"),
        ("resnet50", {"widths": [0, 8, 8, 8]}, "Encoder 'resnet50': widths must be at least 1, got 0"),
        ("densenet121", {"depths": []}, "Encoder 'densenet121': depths must be a list of whole numbers"),
        ("densenet121", {"growth": 0}, "Encoder 'densenet121': growth must be at least 1"),
        ("mobilenetv2", {"stages": []}, "stages must be positions of the 8 stages"),
        ("cnn-tiny", {"widths": [8, 4.5]}, r"Encoder 'cnn-tiny': widths must be an integer, got float \(4.5\)"),
        ("clip", {"patch": 0}, "Encoder 'clip': patch must be at least 1"),
        ("clip", {"patch": 33}, "image_px must be a multiple of patch, got 224 and 33"),
        ("conch", {"pooler_heads": 0}, "Encoder 'conch': pooler_heads must be at least 1"),
        ("ae-gene", {"depth": 0}, "Encoder 'ae-gene': depth must be at least 1"),
        ("ae-gene", {"n_tokens": 0}, "Encoder 'ae-gene': n_tokens must be at least 1"),
        ("scgpt", {"heads": 5}, "width must be a multiple of heads, got 32 and 5"),
        ("scgpt", {"n_bins": 1}, "Encoder 'scgpt': n_bins must be at least 2"),
        ("scfoundation", {"max_genes": 0}, "Encoder 'scfoundation': max_genes must be at least 1"),
        ("novae", {"n_rows": 0}, "Encoder 'novae': n_rows must be at least 1"),
        ("novae", {"heads": 5}, "must be a multiple of heads, got 16 and 5"),
        ("gene-mlp", {"hidden": [0]}, "Encoder 'gene-mlp': hidden must be at least 1"),
        ("gene-groups", {"n_groups": -3}, "Encoder 'gene-groups': n_groups must be at least 1, got -3"),
        ("pca", {"width": 0}, "Encoder 'pca': width must be at least 1"),
    ],
)
def test_sizes_that_no_network_has_are_refused(name: str, options: dict, match: str):
    with pytest.raises((InputError, WrongTypeError), match=match):
        build_encoder(name, n_genes=G, options={**SHORT.get(name, {}), **options})


def test_counts_that_may_be_none_or_zero():
    assert make("novae").backbone.encoder.mlp_fusion is not None
    without = build_encoder("novae", n_genes=G, options={**SHORT["novae"], "histology": 0, "n_rows": None})
    assert without.backbone.encoder.mlp_fusion is None
    linear = build_encoder("gene-mlp", n_genes=G, options={"hidden": (), "dropout": 0.0})
    assert len(linear.backbone.layers) == 1
    with pytest.raises(InputError, match="n_genes must be at least 1"):
        build_encoder("gene-mlp", n_genes=0)


def test_wrong_shapes():
    with pytest.raises(InputError, match=r"tiles must be \(b, 3, h, w\)"):
        make("cnn-tiny")(torch.zeros(2, 28, 28, 3))
    with pytest.raises(InputError, match=r"counts must be \(b, 40\)"):
        make("gene-mlp")(torch.zeros(2, 41))
    with pytest.raises(InputError, match="do not fit in 10 ids"):
        build_encoder("scgpt", n_genes=G, options={"n_ids": 10})


def test_ready_made_encoders_and_specs_are_taken():
    encoder = make("cnn-tiny")
    assert build_encoder(encoder) is encoder
    assert build_encoder(encoder, mode="frozen").frozen
    spec = EncoderSpec("mine", "image", "stfm.encoders.image.cnn:plain_cnn", 8, options={"widths": [4]})
    assert isinstance(build_encoder(spec), ImageEncoder)
    assert isinstance(make("pca"), GeneEncoder)
    with pytest.raises(InputError, match="modality='sound' is unknown"):
        EncoderSpec("mine", "sound", "x:y", 8)


def test_weights_that_are_not_there_are_told_before_a_network_is_made(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("stfm.encoders.build._factory", lambda _: lambda spec, **_: made.append(spec))
    with pytest.raises(MissingKeyError, match=r"no weights file .*nope\.bin"):
        build_encoder("uni", weights=str(tmp_path / "nope.bin"))
    assert made == []
