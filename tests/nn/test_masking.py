from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from stfm.nn.masking import hide_positions, show_sites


@given(n=st.integers(1, 6), positions=st.integers(2, 60), share=st.floats(0.0, 1.0))
def test_each_sample_hides_the_same_number(n: int, positions: int, share: float):
    hidden = hide_positions(n, positions, share)
    assert hidden.shape == (n, positions)
    assert len(set(hidden.sum(dim=1).tolist())) == 1
    assert 1 <= int(hidden[0].sum()) < positions
    assert abs(int(hidden[0].sum()) - share * positions) <= 1.0


def test_every_position_is_hidden_half_of_the_time():
    hidden = hide_positions(4000, 16, 0.5, torch.Generator().manual_seed(0))
    assert hidden.sum(dim=1).eq(8).all()
    assert (hidden.double().mean(dim=0) - 0.5).abs().max() < 0.04


@given(n=st.integers(1, 8), sites=st.integers(1, 5), share=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_sites_that_are_there_are_shown_by_share(n: int, sites: int, share: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(n, sites, generator=generator) < 0.7
    shown = show_sites(present, share, generator)
    there = int(present.sum())
    assert not (shown & ~present).any()
    if there < 2:
        assert not shown.any()
    else:
        assert 1 <= int(shown.sum()) < there
        assert abs(int(shown.sum()) - share * there) <= 1.0


def test_masks_are_seeded():
    present = torch.ones(10, 3, dtype=torch.bool)
    draws = [show_sites(present, 0.5, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
