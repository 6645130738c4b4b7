"""ST-Align: its options, ablations, and the parts that are fitted to data."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from stfm._errors import InputError, WrongTypeError
from stfm.encoders import build_encoder
from stfm.models import create, load
from stfm.models._slots import EncoderChoice
from stfm.models.base import config_from_dict
from stfm.models.inputs import SlideInputs
from stfm.models.st_align import STAlign
from stfm.models.st_align_config import ABLATIONS, PRESETS, STAlignConfig
from stfm.nn.losses import contrastive_loss
from stfm.slide.genes import Vocabulary


def make(vocabulary, **changes) -> STAlign:
    torch.manual_seed(0)
    return create("st-align-tiny", vocabulary, **changes)  # type: ignore[return-value]


@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_go_to_json_and_back(preset: str):
    import json

    config = STAlignConfig.preset(preset)
    assert config_from_dict(STAlignConfig, json.loads(json.dumps(asdict(config)))) == config


def test_defaults_are_the_papers_sizes():
    config = STAlignConfig.preset()
    assert [getattr(config, slot).name for slot in ("spot_image", "niche_image", "spot_gene", "niche_gene")] == [
        "ae-img", "uni", "scgpt", "ae-gene",
    ]  # fmt: skip
    assert (config.width, config.n_tokens, config.spot_px, config.niche_px) == (512, 8, 28, 224)
    assert config.loss_weights == pytest.approx({"spot": 1 / 3, "niche": 1 / 3, "spot_niche": 1 / 3})
    literal = STAlignConfig.preset("paper")
    assert (literal.denominator, literal.attention_scale, literal.attention_softmax) == ("negatives", "d", "batch")
    assert not literal.normalise
    documented = STAlignConfig.__doc__ or ""
    assert [f.name for f in fields(config) if f.name not in documented] == []


def test_total_is_equation_12(vocabulary, make_batch):
    model = make(vocabulary, lambda1=0.5, lambda2=0.2, temperature_per_loss=False).eval()
    losses = model.losses(make_batch(model))
    assert set(losses) == {"loss", "spot", "niche", "spot_niche"}
    expected = 0.5 * losses["spot"] + 0.2 * losses["niche"] + 0.3 * losses["spot_niche"]
    torch.testing.assert_close(losses["loss"], expected)
    outputs = model(make_batch(model))
    scale = model.temperatures["all"]()
    torch.testing.assert_close(
        losses["spot_niche"],
        contrastive_loss(outputs["spot"].fused, outputs["niche"].fused, scale=scale, symmetric=False),
    )
    torch.testing.assert_close(
        losses["niche"], contrastive_loss(outputs["niche"].image, outputs["niche"].gene, scale=scale)
    )


@pytest.mark.parametrize("changes", [
    {"denominator": "negatives"},
    {"symmetric_ns": True},
    {"normalise": False},
    {"learn_temperature": False, "temperature": 0.5},
    {"temperature_per_loss": True},
    {"negatives": "slide"},
    {"mask_overlap": True},
    {"share_directions": True, "share_levels": True},
    {"attention_scale": "d", "attention_softmax": "batch"},
    {"residual": "none"},
    {"fusion": "concat"},
    {"fusion": "linear", "missing": "token", "modality_dropout": 0.5},
    {"missing": "token", "modality_dropout": 0.5},
    {"missing": "token"},
    {"projection": "mlp", "projection_norm": "layer", "projection_dropout": 0.1},
    {"lambda1": 1.0, "lambda2": 0.0},
    {"parts": "spot", "joint": "niche"},
    {"joint": "niche"},
], ids=str)  # fmt: skip
def test_options_train_save_and_embed(changes: dict, vocabulary, make_batch, tmp_path: Path):
    model = make(vocabulary, **changes).train()
    loss = model.losses(make_batch(model))["loss"]
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    batch = make_batch(model)
    with torch.no_grad():
        joint = model.embed(batch).joint
        fused = 128 if changes.get("fusion") == "concat" else 64
        assert joint.shape[1] == fused * (2 if model.config.joint == "concat" else 1)
        model.save(tmp_path)
        assert torch.equal(load(tmp_path).embed(batch).joint, joint)
        assert torch.isfinite(model.embed(batch.without("image")).joint).all()


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations(ablation: str, vocabulary, make_batch, tmp_path: Path):
    model = make(vocabulary, ablation=ablation).train()
    losses = model.losses(make_batch(model))
    losses["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    expected = {
        "no-ns": {"spot", "niche"},
        "spot": {"spot"},
        "niche": {"niche"},
    }.get(ablation, {"spot", "niche", "spot_niche"})
    assert set(losses) - {"loss"} == expected
    assert sum(model.plan.loss_weights.values()) == pytest.approx(1.0)
    levels = {"spot": ["spot"], "niche": ["niche"]}.get(ablation, ["spot", "niche"])
    assert list(model.levels) == levels
    embedding = model.eval().embed(make_batch(model))
    assert (embedding.niche is None) == (ablation == "spot")
    model.save(tmp_path)
    assert load(tmp_path).config.ablation == ablation


def test_without_adaptive_encoders_the_frozen_ones_stand_in_and_are_held_once(vocabulary):
    model = make(vocabulary, ablation="no-ae")
    assert model.levels["spot"].image is model.levels["niche"].image
    assert model.levels["niche"].gene.spec.name == "pca"
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and n.startswith("levels")}
    assert trained == {"image_projection", "gene_projection", "fusion"}


def test_modality_dropout_never_takes_both(vocabulary):
    level = make(vocabulary, modality_dropout=1.0, missing="token").train().levels["spot"]
    image, gene = torch.randn(2, 200, 64)
    has_image, has_gene = level._dropped(image, gene)
    assert (has_image ^ has_gene).all()
    assert 50 < int(has_image.sum()) < 150
    assert level.eval()._dropped(image, gene) == (None, None)


def test_parts_and_joint_are_unit_vectors(vocabulary, make_batch):
    model = make(vocabulary, parts="concat").eval()
    embedding = model.embed(make_batch(model))
    for part in (embedding.joint, embedding.image, embedding.gene, embedding.niche):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(8))
    assert embedding.image.shape == (8, 128)
    # Side by side, the dot product of the parts is the mean over both levels.
    outputs = model(make_batch(model))
    cosine = torch.stack(
        [torch.cosine_similarity(outputs[level].image, outputs[level].gene) for level in ("spot", "niche")]
    ).mean(0)
    torch.testing.assert_close((embedding.image * embedding.gene).sum(1), cosine)


def test_it_learns_pairs(vocabulary, make_batch):
    """On pairs that carry the same signal the loss falls well below chance, ln n."""
    model = make(vocabulary, spot_image="cnn-tiny", mask_overlap=False).train()
    generator = torch.Generator().manual_seed(0)
    signal = torch.rand(32, 3, generator=generator)
    tiles = (signal[:, :, None, None] * 255).to(torch.uint8)
    genes = (3 * signal).repeat_interleave(20, dim=1)
    batch = replace(
        make_batch(model, n=32),
        spot_tiles=tiles.expand(-1, -1, 28, 28),
        niche_tiles=tiles.expand(-1, -1, 56, 56),
        counts=genes,
        niche_counts=genes,
    )
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(25):
        optimiser.zero_grad()
        loss = model.losses(batch)["loss"]
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.8 * math.log(32)


def slides_of(vocabulary, model):
    """Two slides as models see them, one of which lacks genes."""

    class Stub(SlideInputs):
        def __init__(self, x: np.ndarray, mask: np.ndarray) -> None:
            self.x, self.has_gene = x, True
            self.match = type("Match", (), {"mask": mask})()

        n_obs = property(lambda self: len(self.x))

        def expression(self, indices):
            return self.x[indices]

        def niche_expression(self, indices):
            return self.x[indices] + 1

    rng = np.random.default_rng(0)
    x = sparse.random(300, len(vocabulary), 0.4, rng=rng).toarray().astype(np.float32) * 3
    mask = np.ones(len(vocabulary), dtype=bool)
    half = mask.copy()
    half[::2] = False
    return [Stub(x[:200], mask), Stub(x[200:] * half, half)]


def test_gene_encoders_are_fitted_to_the_training_slides(vocabulary, make_batch, tmp_path: Path):
    model = make(vocabulary)
    slides = slides_of(vocabulary, model)
    model.fit_inputs(slides)
    pca = model.levels["spot"].gene.backbone
    x = torch.from_numpy(slides[0].x)
    scores = model.levels["spot"].gene(x)
    torch.testing.assert_close(scores.std(dim=0), torch.ones(32), atol=0.35, rtol=0)
    assert torch.equal(pca.components, make_and_fit(vocabulary).levels["spot"].gene.backbone.components)
    niche = model.levels["niche"].gene.backbone.scaler.mean
    torch.testing.assert_close(
        niche[1::2], torch.from_numpy(np.concatenate([s.x for s in slides])[:, 1::2]).mean(0) + 1
    )
    model.save(tmp_path)
    assert torch.equal(load(tmp_path).levels["spot"].gene.backbone.components, pca.components)


def make_and_fit(vocabulary) -> STAlign:
    model = make(vocabulary)
    model.fit_inputs(slides_of(vocabulary, model))
    return model


def test_weights_that_a_choice_names_are_read_when_made_and_not_when_loaded(vocabulary, tmp_path: Path):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    reference = build_encoder("mobilenetv2")
    path = tmp_path / "mobilenet.safetensors"
    save_file(reference.backbone.state_dict(), path)
    model = make(vocabulary, niche_image=EncoderChoice("mobilenetv2", weights=str(path)))
    encoder = model.frozen_image_encoder("niche")
    assert encoder is not None
    assert encoder.fingerprint() == reference.set_mode("frozen").fingerprint()
    assert model.frozen_image_encoder("spot") is None
    model.save(tmp_path / "model")
    path.unlink()
    assert load(tmp_path / "model").weights_sha256() == model.weights_sha256()


def test_inputs(vocabulary):
    spec = make(vocabulary, spot_um=55.0, n_neighbors=6, include_self=True, ties="all").inputs
    assert (spec.spot_px, spec.niche_px, spec.spot_um, spec.n_neighbors) == (28, 56, 55.0, 6)
    assert spec.include_self
    spot = make(vocabulary, ablation="spot").inputs
    assert spot.niche_px is None
    assert not spot.niche_counts


@pytest.mark.parametrize(("changes", "message"), [
    ({"lambda1": 0.8, "lambda2": 0.4}, "at most 1"),
    ({"width": 60}, "l even"),
    ({"projection": "none"}, "shared width 64"),
    ({"joint": "both"}, "joint='both' is unknown"),
    ({"ablation": "no-abf"}, "Did you mean 'no-abfn'"),
    ({"temperature": 0.0}, "temperature must be"),
    ({"spot_image": "pca"}, "spot_image needs an encoder of images"),
    ({"spot_image": None}, "Level 'spot' needs an image and a gene encoder"),
    ({"spot_image": "cnn-tyni"}, "Did you mean 'cnn-tiny'"),
], ids=str)  # fmt: skip
def test_wrong_options(changes: dict, message: str, vocabulary):
    with pytest.raises((InputError, KeyError), match=message):
        make(vocabulary, **changes)


def test_wrong_kinds_of_choices(vocabulary):
    with pytest.raises(WrongTypeError, match="name of an encoder, a mapping or an EncoderChoice"):
        make(vocabulary, spot_image=3)
    with pytest.raises(InputError, match="no entry 'weight'. Did you mean 'weights'"):
        make(vocabulary, niche_image={"name": "uni", "weight": "file"})
    with pytest.raises(InputError, match="needs the 'name' of an encoder"):
        make(vocabulary, niche_image={"weights": "file"})
    with pytest.raises(InputError, match="one level at least"):
        make(vocabulary, spot_image=None, spot_gene=None, niche_image=None, niche_gene=None)


def test_vocabulary_of_any_length(make_batch):
    short = Vocabulary(np.array(["MBP", "PLP1", "SNAP25"]))
    model = make(short).eval()
    batch = make_batch(model)
    batch = replace(batch, counts=batch.counts[:, :3], niche_counts=batch.niche_counts[:, :3])
    assert torch.isfinite(model.embed(batch).joint).all()
