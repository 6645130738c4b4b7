"""From slides to batches: cached tiles, parameter groups, frozen parts, thinning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import make_model, make_slide

from stfm._errors import InputError
from stfm.models.inputs import SlideInputs
from stfm.training.data import Batches, SlideData
from stfm.training.module import TrainingModule, parameter_groups
from stfm.training.recipes import Recipe
from stfm.training.sampling import SpotSampler
from stfm.training.tilecache import Budget, CachedTiles, keep_tiles


def inputs(*slides):
    model = make_model()
    return [SlideInputs(s, model.inputs, model.vocabulary, slide_id=i) for i, s in enumerate(slides)]


def batches(recipe=None, epoch=0):
    ready = inputs(make_slide("A", 20), make_slide("B", 10, seed=1))
    return list(Batches(ready, SpotSampler([20, 10], 8), epoch=lambda: epoch, recipe=recipe))


def test_batches_hold_every_spot_of_every_slide():
    spots = [(s, i) for b in batches() for s, i in zip(b.slide_id.tolist(), b.index.tolist(), strict=True)]
    assert sorted(spots) == [(0, i) for i in range(20)] + [(1, i) for i in range(10)]


def test_thinning_differs_by_epoch_and_keeps_the_rest():
    thin = Recipe(count_thinning=0.5, flips=False)
    plain, one, again, other = batches(), batches(thin), batches(thin), batches(thin, epoch=1)
    assert torch.equal(one[0].counts, again[0].counts)
    assert not torch.equal(one[0].counts, plain[0].counts)
    assert not torch.equal(one[0].counts, other[0].counts)
    assert torch.equal(one[0].spot_tiles, plain[0].spot_tiles)
    assert torch.equal(one[0].niche_index, plain[0].niche_index)


def test_cached_tiles_equal_the_reader_and_read_once():
    slide = make_slide(n=12)
    cached = CachedTiles(slide.tiles, Budget(1.0))
    index = np.array([5, 2, 5, 11])
    expected = make_slide(n=12).tiles.read(index, size_um=55.0, size_px=6)
    for _ in range(2):
        np.testing.assert_array_equal(cached.read(index, size_um=55.0, size_px=6), expected)
    assert slide.tiles.n_read == 3
    out = np.empty_like(expected)
    assert cached.read(index, size_um=55.0, size_px=6, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert cached.n_obs == 12
    assert cached.fingerprint() == slide.tiles.fingerprint()


def test_the_budget_is_kept():
    ready = inputs(make_slide("A", 20), make_slide("B", 20, seed=1))
    readers = [one.slide.tiles for one in ready]
    keep_tiles(ready, 20 * 6 * 6 * 3 / 1e9)  # room for the spot tiles of one slide
    for _ in range(3):
        for one in ready:
            one.tiles(np.arange(20), "spot")
    assert [r.n_read for r in readers] == [20, 60]


def test_parameter_groups_spare_biases_norms_and_temperature():
    model = make_model()
    groups = parameter_groups(model)
    decayed = {id(p) for g in groups if g["decays"] for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert names == {"image.0.weight", "gene.weight", "niche_map.weight"}
    everything = {id(p) for g in groups for p in g["params"]}
    assert everything == {id(p) for p in model.parameters() if p.requires_grad}
    assert [g["decays"] for g in parameter_groups(model, decay_all=True)] == [True]


def test_frozen_parts_are_in_evaluation_mode_while_the_rest_trains():
    module = TrainingModule(make_model(), Recipe(), total_steps=1, slide_names=[])
    module.train()
    assert module.model.image[1].training
    assert not any(part.training for part in module.model.niche.modules())


def test_data_need_a_trainer():
    data = SlideData(inputs(make_slide()), [], Recipe())
    with pytest.raises(InputError, match="engine.fit"):
        data.train_dataloader()
    assert data.steps_per_epoch() == 1
