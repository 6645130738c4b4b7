"""Augmentation of a batch: what it changes and what it must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import make_slide

from stfm.nn.batch import Batch
from stfm.training.augment import augment, crop, drop_genes, jitter_stain, thin_counts, turn
from stfm.training.recipes import Recipe


def tiles(n=16, size=5):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def test_turn_gives_the_eight_symmetries():
    one = tiles(1).repeat(8, 1, 1, 1)
    turned = turn(one, torch.arange(8))
    assert torch.equal(turned[0], one[0])
    assert len({t.numpy().tobytes() for t in turned}) == 8
    assert all(torch.equal(t.flatten(1).sort(1).values, one[0].flatten(1).sort(1).values) for t in turned)


def test_crop_of_the_whole_tile_changes_nothing():
    x = tiles()
    assert torch.equal(crop(x, torch.tensor([[1.0, 0.3, -0.7]]).expand(16, -1)), x)


def test_crop_shows_the_square_that_was_asked_for():
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    x[:, :, :4, 4:] = 200  # the upper right quarter
    box = torch.tensor([[0.5, 1.0, -1.0], [0.5, -1.0, 1.0]])  # that quarter, and the one across
    shown = crop(x, box)
    assert shown[0, :, 1:-1, 1:-1].eq(200).all()
    assert shown[1, :, 1:-1, 1:-1].eq(0).all()


def test_all_tiles_of_a_spot_are_cut_alike():
    one = tiles(4, 8)
    batch = Batch(spot_tiles=one[:, None].repeat(1, 3, 1, 1, 1))
    changed = augment(batch, Recipe(flips=False, crop=0.5), np.random.default_rng(0)).spot_tiles
    assert not torch.equal(changed[:, 0], one)
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert torch.equal(changed[:, 0], changed[:, 2])


def test_stain_jitter_of_one_changes_nothing_and_white_stays_white():
    x = tiles()
    assert torch.equal(jitter_stain(x, torch.ones(16, 3)), x)
    white = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(jitter_stain(white, torch.tensor([[0.5, 1.5, 1.0]] * 2)), white)


def test_stain_jitter_scales_one_stain():
    density = torch.tensor([0.65, 0.70, 0.29]) / torch.tensor([0.65, 0.70, 0.29]).norm()
    pixel = (torch.exp(-density) * 256 - 1).round().to(torch.uint8).view(1, 3, 1, 1)
    darker = jitter_stain(pixel, torch.tensor([[2.0, 1.0, 1.0]]))
    expected = (torch.exp(-2 * density) * 256 - 1).view(1, 3, 1, 1)
    assert torch.allclose(darker.float(), expected, atol=2)


def test_both_tiles_of_a_spot_turn_alike():
    batch = Batch(spot_tiles=tiles(), niche_tiles=tiles())
    changed = augment(batch, Recipe(), np.random.default_rng(0))
    assert torch.equal(changed.spot_tiles, changed.niche_tiles)
    assert not torch.equal(changed.spot_tiles, batch.spot_tiles)


def test_augment_depends_on_the_generator_alone():
    recipe = Recipe(stain_jitter=0.2, gene_dropout=0.3)
    batch = Batch(spot_tiles=tiles(), counts=torch.ones(16, 40))
    one, two, other = (augment(batch, recipe, np.random.default_rng(s)) for s in (1, 1, 2))
    assert torch.equal(one.spot_tiles, two.spot_tiles)
    assert torch.equal(one.counts, two.counts)
    assert not torch.equal(one.counts, other.counts)


def test_nothing_asked_nothing_changed():
    batch = Batch(counts=torch.ones(4, 5))
    assert augment(batch, Recipe(), np.random.default_rng(0)) is batch
    off = Batch(spot_tiles=tiles())
    assert augment(off, Recipe(flips=False), np.random.default_rng(0)) is off


def test_gene_dropout_takes_the_same_genes_from_spot_and_niche():
    batch = Batch(counts=torch.ones(4, 200), niche_counts=torch.ones(4, 200))
    changed = drop_genes(batch, 0.25, np.random.default_rng(0))
    assert torch.equal(changed.counts, changed.niche_counts)
    assert (changed.counts == 0).float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert set(changed.counts[:, 0].tolist()) in ({0.0}, {1.0})


def test_thinned_counts_are_counts():
    slide = make_slide(n=200)
    thinned = thin_counts(slide, 0.5, np.random.default_rng(1))
    before, after = slide.counts.to_csr(), thinned.counts.to_csr()
    assert np.array_equal(after.data, np.rint(after.data))
    assert (after.toarray() <= before.toarray()).all()
    assert 0.5 <= after.sum() / before.sum() < 1
    assert thin_counts(slide, 0.0, np.random.default_rng(1)) is slide
