"""CLIP and PLIP baselines, as STimage-1K4M trains them."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from stfm._errors import InputError
from stfm.models import create
from stfm.models.base import config_from_dict
from stfm.models.contrastive import Contrastive, ContrastiveConfig


def make(vocabulary, name: str = "clip-small", **changes) -> Contrastive:
    torch.manual_seed(0)
    return create(name, vocabulary, pretrained=False, **changes)  # type: ignore[return-value]


def test_full_size_is_linear_32_on_both_sides(vocabulary):
    with torch.device("meta"):
        model = make(vocabulary, "clip")
    head = next(m for m in model.image_projection.modules() if isinstance(m, torch.nn.Linear))
    assert head.weight.shape == (32, 512)
    gene = [m for m in model.gene.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.weight.shape for m in gene] == [(32, len(vocabulary))]
    assert isinstance(model.gene_projection, torch.nn.Identity)
    assert all(p.requires_grad for p in model.parameters())
    assert model.inputs.spot_px == 224
    assert model.inputs.niche_px is None


def test_loss_is_the_mean_of_two_cross_entropies(vocabulary, make_batch):
    model = make(vocabulary).eval()
    batch = make_batch(model)
    image, gene = model(batch)
    logits = image @ gene.T / 0.07
    target = torch.arange(8)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    losses = model.losses(batch)
    torch.testing.assert_close(losses["loss"], expected)
    assert float(model.temperature.log_scale.detach()) == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize(("joint", "width"), [("concat", 64), ("mean", 32), ("image", 32), ("gene", 32)])
def test_joint(joint: str, width: int, vocabulary, make_batch):
    model = make(vocabulary, joint=joint).eval()
    embedding = model.embed(make_batch(model))
    assert embedding.joint.shape == (8, width)
    torch.testing.assert_close(embedding.joint.norm(dim=1), torch.ones(8))
    assert embedding.niche is None
    torch.testing.assert_close(model.embed(make_batch(model).without("image")).gene, embedding.gene)


def test_any_encoder_fits_the_slots(vocabulary, make_batch):
    model = make(vocabulary, image="cnn-tiny", gene="ae-gene-small", image_px=28, width=16, negatives="slide")
    model.losses(make_batch(model))["loss"].backward()
    assert model.embed(make_batch(model)).gene.shape == (8, 16)
    assert model.frozen_image_encoder("spot") is None
    assert make(vocabulary, "plip-small").frozen_image_encoder("spot") is not None


def test_configuration_goes_back_and_forth():
    config = ContrastiveConfig(image={"name": "cnn-tiny"}, joint="mean")  # type: ignore[arg-type]
    assert config_from_dict(ContrastiveConfig, asdict(config)) == config


def test_wrong_options(vocabulary):
    with pytest.raises(InputError, match="needs an encoder in slot 'image'"):
        make(vocabulary, image=None)
    with pytest.raises(InputError, match="reads genes"):
        make(vocabulary, image="pca")
    with pytest.raises(InputError, match="joint='sum' is unknown"):
        make(vocabulary, joint="sum")
