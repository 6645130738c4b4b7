from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stfm.nn.alignment import match_loss, place_contrast, sample_contrast


def pairs(b: int, p: int, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(b, p, d, generator=generator), torch.randn(b, p, d, generator=generator)


def all_of(b: int, p: int) -> torch.Tensor:
    return torch.ones(b, p, dtype=torch.bool)


@pytest.mark.parametrize("n", [4, 8])
def test_identity_cosines(n: int):
    """With cosines 1 on the diagonal and 0 elsewhere InfoNCE is ln(1 + (n - 1) exp(-1 / τ))."""
    eye = torch.eye(n)
    expected = math.log1p((n - 1) * math.exp(-1 / 0.1))
    inter = sample_contrast(eye[:, None], eye[:, None], all_of(n, 1), temperature=0.1)
    intra = place_contrast(eye[None], eye[None], all_of(1, n), temperature=0.1)
    assert float(inter) == pytest.approx(expected, rel=5e-3)
    assert float(intra) == pytest.approx(expected, rel=5e-3)


def test_equal_vectors_cannot_be_told_apart():
    same = torch.ones(8, 3, 4)
    assert float(sample_contrast(same, same, all_of(8, 3), temperature=0.1)) == pytest.approx(math.log(8))
    assert float(place_contrast(same, same, all_of(8, 3), temperature=0.1)) == pytest.approx(math.log(3))


def test_contrast_against_cross_entropy():
    image, gene = pairs(5, 3)
    unit = [F.normalize(t, dim=-1) for t in (image, gene)]
    target = torch.arange(5)
    at = [unit[0][:, j] @ unit[1][:, j].T / 0.2 for j in range(3)]
    expected = torch.stack([(F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2 for s in at]).mean()
    torch.testing.assert_close(sample_contrast(image, gene, all_of(5, 3), temperature=0.2), expected)


def test_places_that_do_not_count_change_nothing():
    image, gene = (t.requires_grad_() for t in pairs(4, 3))
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    for contrast in (sample_contrast, place_contrast):
        loss = contrast(image, gene, valid, temperature=0.1)
        gradients = torch.autograd.grad(loss, (image, gene))
        for gradient in gradients:
            assert torch.isfinite(gradient).all()
            assert gradient[~valid].abs().max() == 0
            assert gradient[2, 0].abs().max() > 0


def test_nothing_to_tell_apart_is_a_loss_of_zero():
    image, gene = (t.requires_grad_() for t in pairs(3, 1))
    loss = place_contrast(image, gene, all_of(3, 1), temperature=0.1)
    loss.backward()
    assert loss.item() == 0
    assert image.grad.abs().max() == 0


def test_matching():
    eye = torch.eye(4)
    pair, other = F.softplus(torch.tensor(-1 / 0.1)), F.softplus(torch.tensor(0.0))
    torch.testing.assert_close(match_loss(eye, eye, temperature=0.1), (pair + other) / 2)
    assert float(match_loss(eye, eye.flip(0), temperature=0.1)) > float(match_loss(eye, eye, temperature=0.1))
    assert torch.isfinite(match_loss(eye[:1], eye[:1], temperature=0.1))
