from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stfm._errors import InputError
from stfm.nn.patches import patchify, reorder_legacy, share_on_own_token, unpatchify


@given(side=st.integers(1, 5), size=st.integers(1, 4), channels=st.integers(1, 3))
def test_unpatchify_undoes_patchify(side: int, size: int, channels: int):
    image = torch.arange(2 * (side * size) ** 2 * channels).view(2, side * size, side * size, channels)
    tokens = patchify(image, size)
    assert tokens.shape == (2, side * side, size * size * channels)
    assert torch.equal(unpatchify(tokens, size), image)


def test_patches_follow_each_other_row_by_row():
    image = torch.arange(16).view(1, 4, 4, 1)
    assert patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("size", [4, 16])
def test_every_bin_lies_on_its_own_token(size: int):
    assert share_on_own_token(14, size) == 1.0
    # the published layout: one bin in fourteen
    assert share_on_own_token(14, size, legacy_reshape=True) == pytest.approx(0.07142857142857142, abs=1e-15)


def test_the_legacy_layout_is_a_plain_reshape():
    tokens = torch.randn(2, 9, 4 * 5)
    image = unpatchify(tokens, 2, legacy_reshape=True)
    assert torch.equal(image, tokens.reshape(2, 6, 6, 5))
    assert torch.equal(unpatchify(reorder_legacy(tokens, 2), 2), image)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="5 x 4 cannot be cut into patches of 2"):
        patchify(torch.zeros(1, 5, 4, 1), 2)
    with pytest.raises(InputError, match="3 tokens of length 4 make no square"):
        unpatchify(torch.zeros(1, 3, 4), 2)
    with pytest.raises(InputError, match="4 tokens of length 6"):
        unpatchify(torch.zeros(1, 4, 6), 2)
