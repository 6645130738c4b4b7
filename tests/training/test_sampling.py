"""Every spot once an epoch, near-equal batches, the same on every machine, shared between devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfm._errors import InputError
from stfm.training.sampling import SpotSampler

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def flat(batches):
    return [(pick.slide, int(i)) for picks in batches for pick in picks for i in pick.indices]


@given(sizes, st.integers(1, 40), st.booleans(), st.integers(0, 3))
def test_every_spot_once_an_epoch(sizes, batch_size, mixed, epoch):
    sampler = SpotSampler(sizes, batch_size, mixed=mixed)
    batches = sampler.batches(epoch)
    assert len(batches) == len(sampler)
    spots = flat(batches)
    assert len(spots) == len(set(spots)) == sum(sizes)
    lengths = [sum(len(p.indices) for p in picks) for picks in batches]
    assert max(lengths) <= batch_size
    if mixed:
        assert max(lengths) - min(lengths) <= 1
    else:
        assert all(len(picks) == 1 for picks in batches)


@given(sizes, st.integers(1, 40), st.booleans(), st.integers(0, 3))
def test_slides_have_equal_shares_of_a_balanced_epoch(sizes, batch_size, mixed, epoch):
    sampler = SpotSampler([*sizes, 0], batch_size, mixed=mixed, balanced=True)
    batches = sampler.batches(epoch)
    assert len(batches) == len(sampler)
    for picks in batches:
        assert all(len(set(pick.indices)) == len(pick.indices) for pick in picks)
        assert mixed or len(picks) == 1
    share = round(sum(sizes) / len(sizes))
    for slide, size in enumerate(sizes):
        spots = [spot for number, spot in flat(batches) if number == slide]
        assert len(spots) <= share
        assert len(set(spots)) == min(size, share)


def test_a_small_slide_is_met_as_often_as_a_large_one():
    batches = SpotSampler([2000, 100], 50, mixed=False, balanced=True).batches(0)
    met = [picks[0].slide for picks in batches]
    assert met.count(0) == met.count(1) == 21


@given(sizes, st.integers(1, 10), st.integers(1, 4))
def test_devices_share_the_batches(sizes, batch_size, world):
    if len(SpotSampler(sizes, batch_size)) < world:
        return
    ranks = [SpotSampler(sizes, batch_size, rank=r, world=world) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    shared = [spot for r in ranks for spot in flat(r.batches(2))]
    assert len(shared) == len(set(shared))
    assert set(shared) <= set(flat(SpotSampler(sizes, batch_size).batches(2)))


def test_order_depends_on_seed_and_epoch_alone():
    one, two = SpotSampler([30, 20], 8, seed=1), SpotSampler([30, 20], 8, seed=1)
    two.batches(0)
    assert flat(one.batches(5)) == flat(two.batches(5))
    assert flat(one.batches(5)) != flat(one.batches(6))
    assert flat(one.batches(5)) != flat(SpotSampler([30, 20], 8, seed=2).batches(5))


def test_positions_are_sorted_within_a_slide():
    for picks in SpotSampler([30, 20], 8).batches(0):
        assert all(np.all(np.diff(p.indices) > 0) for p in picks)


def test_too_few_batches_for_the_devices():
    with pytest.raises(InputError, match=r"3 spots give 1 batch\(es\) of 8 for 2 devices"):
        SpotSampler([3], 8, world=2)
