"""A tower trained further on H&E alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import stfm as sf
from stfm.errors import InputError
from stfm.models import create
from stfm.models.distillation import DistillationConfig
from stfm.nn.batch import Batch
from stfm.slide import as_slides

TINY = {"pretrained": False}


def tiles(n: int = 8, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    large = torch.randint(0, 256, (n, 3, 56, 56), dtype=torch.uint8, generator=rng)
    return Batch(spot_tiles=large[:, :, ::2, ::2].contiguous(), niche_tiles=large)


def test_teacher_is_the_start_and_stays():
    model = create("distil-tiny", **TINY).train()
    start = {n: p.clone() for n, p in model.teacher.backbone.state_dict().items()}
    for name, value in model.image.backbone.state_dict().items():
        assert torch.equal(start[name], value)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.losses(tiles())["loss"].backward()
    optimiser.step()
    assert all(torch.equal(start[n], p) for n, p in model.teacher.backbone.state_dict().items())
    assert not all(torch.equal(start[n], p) for n, p in model.image.backbone.state_dict().items())


def test_loss_is_zero_where_both_see_the_same():
    model = create("distil-tiny", **TINY, teacher_px=28).eval()
    batch = tiles()
    same = replace(batch, niche_tiles=batch.spot_tiles)
    with torch.no_grad():
        assert float(model.losses(same)["loss"]) < 1e-6
        assert float(model.losses(batch)["loss"]) > 0.01


def test_loss_is_in_units_of_the_spread_of_the_teachers_features():
    model = create("distil-tiny", **TINY).eval()
    batch = tiles(32)
    with torch.no_grad():
        goal, seen = model.teacher(batch.niche_tiles), model.image(batch.spot_tiles)
        spread = goal.std(dim=0)
        varies = spread > 1e-4  # a feature that does not vary over the batch is left out
        expected = (((seen - goal) / spread)[:, varies] ** 2).sum() / goal.numel()
    torch.testing.assert_close(model.losses(batch)["loss"], expected, rtol=1e-3, atol=1e-5)


def test_training_brings_coarse_tiles_nearer_to_fine_ones():
    adata = sf.datasets.toy(n_spots=120, n_patients=1)
    slides = [replace(slide, spot_um=112.0, niche_um=112.0) for slide in as_slides(adata)]
    model = sf.tl.train(slides, "distil-tiny", epochs=8, batch_size=32, lr=2e-3, validation=None)
    assert model.vocabulary is None
    assert model.history["train_loss"].iloc[-1] < 0.7 * model.history["train_loss"].iloc[0]


def test_slides_of_counts_alone_are_refused():
    adata = sf.datasets.toy(n_spots=40, n_patients=1)
    slides = [replace(slide, tiles=None) for slide in as_slides(adata)]
    with pytest.raises(InputError, match="has none of what the model reads"):
        sf.tl.train(slides, "distil-tiny", epochs=1)


def test_a_frozen_encoder_is_refused():
    with pytest.raises(InputError, match="trains an image encoder"):
        DistillationConfig(image={"name": "handcrafted"})
    with pytest.raises(InputError, match="has no H&E; distillation reads tiles alone"):
        create("distil-tiny", **TINY).embed(Batch(counts=torch.zeros(2, 3)))
