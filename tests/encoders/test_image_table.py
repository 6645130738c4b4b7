"""Rows of image encoders: published layouts, wrong files, pooling, what the table says, callables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stfm as sf
from stfm._errors import DataIntegrityError, InputError, MissingDependencyError, MissingKeyError, WrongTypeError
from stfm.encoders import ENCODERS, ImageEncoder, build_encoder
from stfm.encoders.image.pooling import POOLINGS
from stfm.encoders.keymap import KeyMap
from stfm.slide.genes import Vocabulary

PUBLISHED = [s.name for s in ENCODERS if s.modality == "image" and s.source == "published"]
ISSUE = (
    "uni", "uni2", "gigapath", "hibou-b", "hibou-l", "ctranspath", "conch", "clip", "plip", "phikon", "h0-mini",
    "h-optimus-0", "resnet50", "densenet121", "mobilenetv2", "handcrafted",
)  # fmt: skip
#: bodies cut short, so that real values fit
SHORT: dict[str, dict[str, Any]] = {
    "ctranspath": {"width": 16, "depths": [2, 2, 2, 2], "heads": [1, 2, 2, 4]},
    "conch": {"width": 32, "depth": 2, "heads": 4, "out_width": 16, "input_px": 64},
    "clip": {"width": 32, "depth": 2, "heads": 4, "out_width": 16},
    "plip": {"width": 32, "depth": 2, "heads": 4, "out_width": 16},
    "resnet50": {"depths": [1, 1, 1, 1], "widths": [8, 16, 16, 16]},
    "densenet121": {"growth": 8, "depths": [1, 2, 2, 1], "first": 16},
    "mobilenetv2": {},
}
VIT = {"width": 32, "depth": 2, "heads": 4, "hidden": 48}


def short(name: str, **options: Any) -> ImageEncoder:
    torch.manual_seed(0)
    return build_encoder(name, options={**SHORT.get(name, VIT), **options})


def tiles(n: int = 3, px: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, px, px), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def on_meta(name: str) -> ImageEncoder:
    with torch.device("meta"):
        return build_encoder(name)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_row_of_the_issue_is_there():
    table = sf.models.list_encoders("image")
    assert set(ISSUE) <= set(table.index)
    assert table.equals(sf.encoders.list_encoders("image"))
    assert (table.loc[PUBLISHED, ["licence", "citation", "certainty", "pooling"]] != "").all(axis=None)
    assert table["gated"].dtype == bool
    assert table.loc["gigapath", ["input_px", "resize_px", "interpolation"]].tolist() == [224, 256, "bicubic"]
    assert table.loc["ctranspath", "mpp"] == 1.0
    assert table.loc["conch", "input_px"] == 448
    assert np.isnan(float(table.loc["clip", "mpp"]))
    assert (sf.models.list_encoders("gene")[["mean", "std", "interpolation"]] == "").all(axis=None)
    assert table.loc[["uni", "uni2", "conch", "h0-mini"], "gated"].all()


def test_old_names_and_others():
    assert ENCODERS.get("clip-vit-b32").name == "clip"
    assert ENCODERS.get("plip-vit-b32").name == "plip"
    assert ENCODERS.get("st-net").name == "densenet121"
    assert "timm:resnet18" in ENCODERS
    assert "resnet18" not in ENCODERS


def test_hub_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[tuple[str, bool]] = []
    weights = short("uni").state_dict()
    torch.save({k.removeprefix("backbone."): v for k, v in weights.items()}, tmp_path / "uni.bin")

    def locate(source: str, *, gated: bool = False) -> Path:
        asked.append((source, gated))
        return tmp_path / "uni.bin"

    monkeypatch.setattr("stfm.weights.locate", locate, raising=False)
    encoder = build_encoder("uni", options=VIT, weights="hub")
    assert encoder.fingerprint() == short("uni").fingerprint()
    build_encoder("uni", options=VIT, weights="https://example.org/uni.bin")
    assert asked == [("hub:MahmoodLab/UNI/pytorch_model.bin", True), ("https://example.org/uni.bin", True)]
    with pytest.raises(InputError, match="No file on the Hugging Face hub is known for encoder 'ctranspath'"):
        build_encoder("ctranspath", weights="hub")
    with pytest.raises(InputError, match="give weights='hub:histai/hibou-b/file'"):
        build_encoder("hibou-b", options=VIT, weights="hub")


def test_the_page_shows_the_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "concepts" / "encoders.md"
    if not page.exists():
        pytest.skip("the docs are not part of an installed package")
    table = sf.models.list_encoders("image")
    found = re.findall(r"^\| `([\w-]+)` \| (\d+) \|(.+)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(ISSUE) <= {name for name, _, _ in found}
    for name, width, rest in found:
        row = table.loc[name]
        _, mpp, pooling, licence = (cell.strip() for cell in rest.split("|"))
        assert int(width) == row["width"]
        assert mpp == ("–" if np.isnan(float(row["mpp"])) else f"{row['mpp']:g}")
        assert pooling in ("–", f"`{row['pooling']}`")
        assert licence.removesuffix(", gated") == (row["licence"] or "–")
        assert licence.endswith("gated") == row["gated"]


# -- published layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_loads_strictly(name: str):
    """Names and shapes of the full model, on the meta device, in every layout it reads."""
    encoder = on_meta(name)
    own = encoder.published_state()
    assert sum(p.numel() for p in encoder.parameters()) == ENCODERS.get(name).parameters
    encoder.load_weights(own)
    broken = dict(own)
    gone = next(iter(broken))
    del broken[gone]
    with pytest.raises(DataIntegrityError, match=f"does not hold weights of encoder '{name}': 1 missing"):
        encoder.load_weights(broken)


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_values_from_a_file(name: str, tmp_path: Path):
    first = short(name)
    for layout in first.layouts:
        state = first.published_state(layout)
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "optim": {"lr": 0.1}}, tmp_path / "w.pt")
        torch.manual_seed(1)
        second = build_encoder(name, options=SHORT.get(name, VIT), weights=tmp_path / "w.pt")
        assert second.fingerprint() == first.fingerprint()
        with torch.inference_mode():
            out = second.eval()(tiles())
        assert out.shape == (3, second.width)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_wrong_files_are_refused(name: str, tmp_path: Path):
    encoder = short(name)
    before = encoder.fingerprint()
    other = short("resnet50" if name != "resnet50" else "uni").published_state()
    with pytest.raises(DataIntegrityError, match=f"does not hold weights of encoder '{name}': .* missing .* unknown"):
        encoder.load_weights(other)
    state = encoder.published_state()
    key = next(k for k, v in state.items() if v.ndim)
    with pytest.raises(DataIntegrityError, match=r"1 of another shape"):
        encoder.load_weights({**state, key: torch.zeros(1, 2, 3, 4, 5)})
    with pytest.raises(DataIntegrityError, match=r"1 unknown \(extra.weight\)"):
        encoder.load_weights({**state, "extra.weight": torch.zeros(2)})
    torch.save({"optim": {"lr": 0.1}}, tmp_path / "none.pt")
    with pytest.raises(DataIntegrityError, match="no tensor"):
        encoder.load_weights(tmp_path / "none.pt")
    assert encoder.fingerprint() == before


LISTED = {
    "uni": ("timm", "UNI:"), "uni2": ("timm", "UNI2-h:"), "gigapath": ("timm", "GigaPath tile:"),
    "h-optimus-0": ("timm", "H-optimus-0/1:"), "h0-mini": ("timm", "vit_base_patch14_reg4_dinov2+SwiGLUPacked"),
    "phikon": ("hf", "HF ViTModel base16 no pool (Phikon):"), "plip": ("hf", "HF CLIPModel B/32 (PLIP):"),
    "clip": ("timm", "open_clip ViT-B-32:"), "conch": ("timm", "CONCH trunk-like ViT-B/16 @448:"),
    "resnet50": ("timm", "resnet50 timm/torchvision:"), "ctranspath": ("timm", "swin_tiny (timm 1.x, no ConvStem):"),
}  # fmt: skip


def listed(kind: str, heading: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a listing; ``N`` stands for the numbers up to that of the last name."""
    file = Path(__file__).resolve().parents[3] / "shared" / "weights" / f"encoder_shapes_{kind}.txt"
    if not file.exists():
        pytest.skip("the listings of published layouts, ../shared/weights, are not here")
    text = file.read_text(encoding="utf-8")
    shapes: dict[str, torch.Tensor] = {}
    for line in text.split(f"### {heading}")[1].split("###")[0].splitlines()[1:]:
        found = re.match(r"([\w.]+)(?: x(\d+) \(last ([\w.]+)\))? (\[[\d, ]*\])$", line)
        if found is None:
            continue
        key, count, last, shape = found.groups()
        names = [key]
        if last:
            parts = last.split(".")
            at = len(parts) - 1 - key.split(".")[::-1].index("N")
            first = int(parts[at]) - int(count) + 1
            names = [".".join([*parts[:at], str(first + i), *parts[at + 1 :]]) for i in range(int(count))]
        shapes.update({name: torch.empty(json.loads(shape), device="meta") for name in names})
    return shapes


@pytest.mark.parametrize("name", LISTED)
def test_names_and_shapes_are_the_listed_ones(name: str):
    shapes = listed(*LISTED[name])
    encoder = on_meta(name)
    if name == "conch":  # the listing is of the trunk alone
        pooler = {k: v for k, v in encoder.published_state("CoCa").items() if not k.startswith("visual.trunk.")}
        shapes = {f"visual.trunk.{k}": v for k, v in shapes.items()} | pooler
    if name == "ctranspath":  # the listing is of Swin-T with the usual patches
        stem = {k: v for k, v in encoder.published_state().items() if k.startswith("patch_embed.proj.")}
        shapes = {k: v for k, v in shapes.items() if not k.startswith("patch_embed.proj.")} | stem
    assert len(shapes) > 140
    encoder.load_weights(shapes)


@pytest.mark.parametrize("name", ["uni", "uni2", "gigapath", "h-optimus-0", "h0-mini", "hibou-b", "hibou-l", "phikon"])
def test_layouts_of_others_have_a_place_for_the_class_token(name: str):
    encoder = short(name)
    covered = (encoder.spec.input_px // encoder.backbone.patch_embed.proj.kernel_size[0]) ** 2 + 1
    others = [layout for layout in encoder.layouts if layout != "timm"]
    assert bool(others) == (name not in ("uni2", "h-optimus-0", "h0-mini"))
    for layout in others:
        (table,) = [v for k, v in encoder.published_state(layout).items() if "pos" in k]
        assert table.shape[1] == covered


def test_swin_as_first_published():
    names = set(short("ctranspath").published_state("Swin, original"))
    assert {"layers.0.downsample.reduction.weight", "patch_embed.proj.6.bias"} <= names
    assert not any(name.startswith("layers.3.downsample") for name in names)


def test_conch_can_be_projected():
    encoder = short("conch", project=True)
    state = encoder.published_state("CoCa")
    assert state["visual.proj_contrast"].shape == (16, 16)
    plain = build_encoder("conch", options=SHORT["conch"], weights=state)  # which leaves the projection out
    with torch.inference_mode():
        expected = plain.eval()(tiles()) @ state["visual.proj_contrast"]
        torch.testing.assert_close(encoder.eval()(tiles()), expected)


def test_key_maps_are_read_and_written():
    layout = KeyMap(
        "one", sign=r"x\..+", renames=(("x.{n}.a.{s}", "y.{n}.b.{s}"),), fused=((("x.q.{k}", "x.k.{k}"), "y.qk.{k}"),),
        transposed=("y.0.b.m",), dropped=(r"x\.drop",),
    )  # fmt: skip
    state = {
        "x.0.a.m": torch.arange(6.0).view(2, 3), "x.q.weight": torch.zeros(2, 3), "x.k.weight": torch.ones(2, 3),
        "x.drop": torch.ones(1), "same": torch.ones(1),
    }  # fmt: skip
    assert layout.matches(state)
    assert not layout.matches({"y": torch.ones(1)})
    own = layout.read(state)
    assert {k: tuple(v.shape) for k, v in own.items()} == {"y.0.b.m": (3, 2), "same": (1,), "y.qk.weight": (4, 3)}
    back = layout.write(own)
    assert set(back) == set(state) - {"x.drop"}
    torch.testing.assert_close(back, {k: v for k, v in state.items() if k != "x.drop"})
    assert "y.qk.weight" not in layout.read({"x.q.weight": torch.zeros(2, 3)})  # half of it is nothing
    with pytest.raises(MissingKeyError, match="has no layout 'DINOv3'. There are: 'DINOv2'"):
        short("uni").published_state("DINOv3")


# -- pooling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLISHED, "cnn-tiny", "resnet-small"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(name: str, pooling: str):
    options = {} if name in ("cnn-tiny", "resnet-small") else SHORT.get(name, VIT)
    torch.manual_seed(0)
    try:
        encoder = build_encoder(name, options={**options, "pooling": pooling}).eval()
    except InputError as error:
        assert "is not offered by this encoder; it has" in str(error)  # noqa: PT017
        assert pooling in ("own", "cls", "cls+mean")
        return
    with torch.inference_mode():
        out = encoder(tiles())
    assert out.shape == (3, encoder.width)
    assert torch.isfinite(out).all()
    if pooling == "stages":
        means = build_encoder(name, options={**options, "pooling": "stage-means"})
        assert encoder.width == 2 * means.width
        assert encoder.fingerprint() != means.fingerprint()


def test_pooling_says_what_it_does():
    cls, mean, both = (short("h0-mini", pooling=p).eval() for p in ("cls", "mean", "cls+mean"))
    x = tiles()
    with torch.inference_mode():
        torch.testing.assert_close(both(x), torch.cat([cls(x), mean(x)], dim=1))
        assert not torch.allclose(cls(x), mean(x))
    assert len({e.fingerprint() for e in (cls, mean, both)}) == 3
    last = short("uni", depth=3, pooling="stages", stages=[-1]).eval()
    assert last.width == 64
    seen: list[torch.Tensor] = []
    last.backbone.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.inference_mode():
        out = last(x)
    patches = seen[0][:, 1:]
    torch.testing.assert_close(out, torch.cat([patches.mean(1), patches.std(1, correction=0)], 1), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="stages must be positions of the 2 stages"):
        short("uni", pooling="stages", stages=[2])
    with pytest.raises(InputError, match="pooling='max' is not offered"):
        short("uni", pooling="max")


def test_pooling_of_mobilenet_keeps_its_older_names():
    widths = {"stages": 1992, "last": 1280}
    assert {f: build_encoder("mobilenetv2", options={"features": f}).width for f in widths} == widths
    encoder = build_encoder("mobilenetv2", options={"pooling": "stages", "classifier": True}).eval()
    assert encoder.width == 2 * 1992
    with torch.inference_mode():
        assert encoder.backbone.classify(encoder.prepare(tiles())).shape == (3, 1001)


def test_preparation_may_be_changed():
    encoder = short("densenet121", mean=[0.1, 0.2, 0.3], std=[1, 1, 1], input_px=32)
    assert encoder.spec.mean == (0.1, 0.2, 0.3)
    white = torch.full((1, 3, 50, 50), 255, dtype=torch.uint8)
    assert encoder.prepare(white).shape == (1, 3, 32, 32)
    torch.testing.assert_close(encoder.prepare(white)[0, :, 0, 0], torch.tensor([0.9, 0.8, 0.7]))
    assert short("uni", mean=(0.1, 0.2, 0.3)).fingerprint() == short("uni", mean=[0.1, 0.2, 0.3]).fingerprint()
    with pytest.raises(InputError, match="interpolation='cubic' is unknown"):
        short("uni", interpolation="cubic")
    for wrong in ({"mean": [0, 0]}, {"std": [1, 0, 1]}, {"mpp": 0}, {"input_px": -16}):
        with pytest.raises(InputError, match=f"Encoder 'uni': {next(iter(wrong))} must be"):
            short("uni", **wrong)
    resized = short("gigapath")
    border = white.clone().repeat(1, 1, 6, 6)[..., :256, :256]
    border[..., :16, :] = 0
    assert float(resized.prepare(border).amin()) > 1.0  # the middle 224 of 256 is read


# -- from elsewhere ----------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(dim=(2, 3))


def test_any_callable_is_an_encoder():
    encoder = build_encoder(lambda x: x.mean(dim=(2, 3)))
    assert encoder.width == 3
    assert encoder.frozen
    torch.testing.assert_close(encoder(tiles()), tiles().float().mean(dim=(2, 3)) / 255)
    arrays = build_encoder(lambda x: x.numpy().max(axis=(2, 3)))
    assert arrays(tiles()).dtype == torch.float32
    assert encoder.fingerprint() != build_encoder(lambda x: x.mean(dim=(2, 3))).fingerprint()  # nobody can tell them
    with pytest.raises(WrongTypeError, match="or a callable, got type"):
        build_encoder(Tiny)
    for wrong, error in ((lambda x: x, InputError), (lambda _x: "feature", WrongTypeError)):
        with pytest.raises(error, match="A callable encoder must return"):
            build_encoder(wrong)


def test_any_module_is_an_encoder():
    module = Tiny().eval()
    encoder = build_encoder(module, options={"input_px": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "mpp": 0.5})
    assert (encoder.width, encoder.spec.mpp, encoder.mode) == (5, 0.5, "frozen")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tiles()), module(encoder.prepare(tiles())))
    other = Tiny()
    assert build_encoder(other, options={"input_px": 16}).fingerprint() != encoder.fingerprint()
    build_encoder(other, weights=module.state_dict())
    torch.testing.assert_close(other.state_dict(), module.state_dict())
    assert any(p.requires_grad for p in build_encoder(Tiny(), mode="full").parameters())


def test_models_take_callables_and_cannot_be_saved_with_them(tmp_path: Path):
    genes = Vocabulary(np.array([f"G{i}" for i in range(8)]))
    model = sf.models.create("st-align-tiny", genes, spot_image=Tiny())
    assert model.levels["spot"].image.width == 5
    with pytest.raises(InputError, match="spot_image is a callable, which cannot be written"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_timm_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"timm is not installed.*stfm\[encoders\]"):
        build_encoder("timm:vit_tiny_patch16_224")
    assert ENCODERS.get("timm:vit_tiny_patch16_224").modality == "image"
