"""ALiBi on µm, attention with a bias, blocks with a feed-forward a modality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stfm._errors import InputError
from stfm.nn.attention import Attention, DistanceBias, DropPath, ExpertBlock, alibi_slopes, mask_keys


def places(seed: int = 0, b: int = 3, w: int = 9, axes: int = 2) -> torch.Tensor:
    return 500 * torch.rand(b, w, axes, generator=torch.Generator().manual_seed(seed))


class TestSlopes:
    def test_powers_of_two(self):
        torch.testing.assert_close(alibi_slopes(4), torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]))
        torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
        sixteen = alibi_slopes(16)
        assert float(sixteen[0]) == pytest.approx(0.70710678)
        torch.testing.assert_close(sixteen[1::2], alibi_slopes(8))
        assert float(sixteen[-1]) == 2.0**-8

    def test_others_take_every_second_one_of_the_power_above(self):
        finer = torch.tensor([0.70710678, 0.35355339, 0.17677670, 0.08838835])
        torch.testing.assert_close(alibi_slopes(12), torch.cat([alibi_slopes(8), finer]))
        assert len(alibi_slopes(1)) == 1
        assert len(set(alibi_slopes(12).tolist())) == 12


class TestDistanceBias:
    def test_values(self):
        xy = torch.tensor([[[0.0, 0.0], [100.0, 0.0], [0.0, 250.0]]])
        bias = DistanceBias(4)(xy)
        assert bias.shape == (1, 4, 3, 3)
        torch.testing.assert_close(bias[0, :, 0, 1], -alibi_slopes(4))
        torch.testing.assert_close(bias[0, :, 0, 2], -2.5 * alibi_slopes(4))
        torch.testing.assert_close(DistanceBias(4, unit_um=50.0)(xy), 2 * bias)

    @given(seed=st.integers(0, 10_000), axes=st.sampled_from([2, 3]))
    @settings(max_examples=25, deadline=None)
    def test_zero_on_the_diagonal_symmetric_and_never_positive(self, seed: int, axes: int):
        bias = DistanceBias(8)(places(seed, axes=axes))
        assert torch.equal(bias, bias.transpose(-1, -2))
        assert not torch.diagonal(bias, dim1=-2, dim2=-1).any()
        assert float(bias.detach().max()) == 0.0

    def test_falls_with_distance_in_every_head(self):
        line = torch.stack([torch.arange(20) * 37.0, torch.zeros(20)], dim=1)[None]
        assert (DistanceBias(12)(line)[0, :, 0].diff(dim=-1) < 0).all()

    @given(
        angle=st.floats(0, 2 * math.pi), dx=st.floats(-2000, 2000), dy=st.floats(-2000, 2000), mirrored=st.booleans()
    )
    @settings(max_examples=30, deadline=None)
    def test_the_same_for_a_shifted_and_turned_slide(self, angle: float, dx: float, dy: float, mirrored: bool):
        c, s = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[c, -s], [s, c]]) @ torch.diag(torch.tensor([-1.0 if mirrored else 1.0, 1.0]))
        xy = places()
        bias = DistanceBias(8)
        torch.testing.assert_close(bias(xy @ turn.T + torch.tensor([dx, dy])), bias(xy), atol=2e-3, rtol=1e-3)

    def test_small_distances_far_from_the_origin_are_not_rounded_away(self):
        near = torch.tensor([[[20_000.0, 20_000.0], [20_002.0, 20_000.0]]])  # 2-µm bins of a large slide
        torch.testing.assert_close(DistanceBias(4)(near)[0, :, 0, 1], -0.02 * alibi_slopes(4))

    def test_padded_places_are_not_attended_to(self):
        padding = torch.tensor([[False, False, True], [True, True, True]])
        bias = DistanceBias(4)(places(b=2, w=3), padding)
        assert torch.isneginf(bias[0, :, :, 2]).all()
        assert torch.isfinite(bias[0, :, :, :2]).all()
        assert torch.isfinite(bias[1]).all()  # a softmax over nothing would be nan

    def test_slopes_are_learned_on_request(self):
        assert not DistanceBias(4).log_slopes.requires_grad
        learned = DistanceBias(4, learned=True)
        learned(places()).sum().backward()
        assert learned.log_slopes.grad is not None
        with pytest.raises(InputError, match="unit_um must be"):
            DistanceBias(4, unit_um=0.0)


class TestAttention:
    def test_masked_keys_change_nothing(self):
        torch.manual_seed(0)
        attention, x = Attention(16, 4), torch.randn(2, 5, 16)
        hidden = torch.zeros(2, 5, dtype=torch.bool)
        hidden[:, 3:] = True
        bias = mask_keys(torch.zeros(2, 4, 5, 5), hidden)
        other = x.clone()
        other[:, 3:] = 1e3 * torch.randn(2, 2, 16)
        torch.testing.assert_close(attention(x, bias=bias)[:, :3], attention(other, bias=bias)[:, :3])

    def test_equals_the_formula(self):
        torch.manual_seed(0)
        attention, x, bias = Attention(8, 2), torch.randn(1, 4, 8), torch.randn(1, 2, 4, 4)
        q, k, v = (m(x).view(1, 4, 2, 4).transpose(1, 2) for m in (attention.q, attention.k, attention.v))
        weights = (q @ k.transpose(-1, -2) / 2.0 + bias).softmax(dim=-1)
        expected = attention.out((weights @ v).transpose(1, 2).reshape(1, 4, 8))
        torch.testing.assert_close(attention(x, bias=bias), expected)

    def test_reads_a_context(self):
        torch.manual_seed(0)
        attention = Attention(8, 2, qkv_bias=False)
        assert attention(torch.randn(3, 4, 8), torch.randn(3, 7, 8)).shape == (3, 4, 8)
        assert attention.q.bias is None

    def test_width_must_divide(self):
        with pytest.raises(InputError, match="multiple of heads, got 10 and 4"):
            Attention(10, 4)


class TestExpertBlock:
    def test_a_token_goes_through_the_expert_of_its_modality_alone(self):
        torch.manual_seed(0)
        block, x = ExpertBlock(16, 4, 32), torch.randn(2, 6, 16)
        block(x, [0, 1], [4, 2])[:, :4].sum().backward()
        touched = [any(p.grad is not None and bool(p.grad.any()) for p in e.parameters()) for e in block.experts]
        assert touched == [True, False]
        assert block.attention.q.weight.grad is not None  # attention is shared

    def test_shared_expert(self):
        torch.manual_seed(0)
        block, x = ExpertBlock(16, 4, 32, n_experts=1), torch.randn(2, 6, 16)
        torch.testing.assert_close(block(x, [0, 1], [3, 3]), block(x, [0], [6]))

    def test_a_modality_alone_is_read_by_its_own_expert(self):
        torch.manual_seed(0)
        block, x = ExpertBlock(16, 4, 32, own_norms=True), torch.randn(2, 3, 16)
        assert not torch.allclose(block(x, [0], [3]), block(x, [1], [3]))

    def test_permuting_tokens_of_a_modality_permutes_the_result(self):
        torch.manual_seed(0)
        block, x, order = ExpertBlock(16, 4, 32).eval(), torch.randn(1, 5, 16), torch.tensor([2, 0, 1, 4, 3])
        torch.testing.assert_close(block(x[:, order], [0, 1], [3, 2]), block(x, [0, 1], [3, 2])[:, order])


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1)
    path = DropPath(0.25)
    dropped = path(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert path.eval()(x) is x
