from __future__ import annotations

import torch

from stfm.nn.positions import RelativeBias, ScaledPosition, grid_centres, within


def test_grid_centres_are_in_um_and_row_by_row():
    assert grid_centres(2, 112.0).tolist() == [[28, 28], [84, 28], [28, 84], [84, 84]]


def test_position_knows_the_resolution():
    torch.manual_seed(0)
    position = ScaledPosition(16)
    torch.nn.init.normal_(position.linear.bias)
    grid = grid_centres(4, 4.0)
    fine, coarse = position(0.5 * grid), position(8.0 * grid)
    assert fine.shape == (16, 16)
    assert not torch.allclose(fine, coarse, atol=0.1)
    # the same place in µm is the same position, whatever the px
    torch.testing.assert_close(position(0.5 * (2 * grid)), position(grid))


def test_relative_bias_follows_the_way_between_two_tokens():
    torch.manual_seed(0)
    bias = RelativeBias(4, 8)
    xy = 10 * torch.rand(2, 5, 2)
    out = bias(xy)
    assert out.shape == (2, 4, 5, 5)
    torch.testing.assert_close(bias(xy + 100.0), out, atol=1e-4, rtol=1e-4)
    # direction counts, unlike a bias on distance
    assert not torch.allclose(out, out.transpose(2, 3), atol=1e-3)
    assert bias(xy, xy[:, :3]).shape == (2, 4, 5, 3)


def test_chosen_rows_have_the_bias_of_the_whole():
    torch.manual_seed(0)
    bias = RelativeBias(2, 8)
    xy = grid_centres(3, 30.0)[None]
    place = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    chosen = bias(xy, place=place)
    assert chosen.shape == (3, 2, 4, 4)
    for i, rows in enumerate(place):
        torch.testing.assert_close(chosen[i], bias(xy[:, rows])[0])


def test_cells_under_a_site():
    cells = grid_centres(7, 112.0)
    under = within(torch.tensor([[[56.0, 56.0], [8.0, 8.0]]]), cells, 12.0)
    assert under.shape == (1, 2, 49)
    assert under[0, 0].nonzero().flatten().tolist() == [24]
    assert under[0, 1].nonzero().flatten().tolist() == [0]
