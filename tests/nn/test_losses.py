"""Contrastive losses against values worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stfm._errors import InputError
from stfm.nn.batch import Batch
from stfm.nn.losses import (
    Temperature,
    check_weights,
    contrastive_loss,
    excluded_pairs,
    weighted_total,
)

EXAMPLE = torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.0, 0.1], [0.0, 0.3, 1.0]], dtype=torch.float64)


def from_similarity(s: torch.Tensor, tau: float, **kwargs) -> float:
    """The loss whose matrix of similarities is ``s``: queries are its rows, keys the unit vectors."""
    identity = torch.eye(len(s), dtype=torch.float64)
    return float(contrastive_loss(s.double(), identity, scale=1 / tau, normalise=False, **kwargs))


@pytest.mark.parametrize(("n", "tau", "every", "negatives"), [
    (4, 0.1, 1.361905e-4, -8.901387712),
    (8, 0.07, 4.374115e-6, -12.339804137),
    (256, 0.1, 0.01151048159, -4.458736455),
    (1024, 0.07, 6.390428e-4, -7.355219520),
])  # fmt: skip
def test_identity_similarities(n: int, tau: float, every: float, negatives: float):
    s = torch.eye(n)
    assert from_similarity(s, tau) == pytest.approx(every, rel=1e-6)
    assert from_similarity(s, tau, denominator="negatives") == pytest.approx(negatives, rel=1e-9)


@pytest.mark.parametrize("n", [2, 8, 100])
def test_equal_similarities(n: int):
    s = torch.full((n, n), 0.3)
    assert from_similarity(s, 0.07) == pytest.approx(math.log(n), abs=1e-9)
    assert from_similarity(s, 0.07, denominator="negatives") == pytest.approx(math.log(n - 1), abs=1e-9)


@pytest.mark.parametrize(("tau", "every", "negatives"), [
    (1.0, 0.6393040369, -0.1144161187),
    (0.5, 0.3460524133, -0.9044903531),
    (0.1, 0.0027243896, -6.8440529838),
])  # fmt: skip
def test_small_example(tau: float, every: float, negatives: float):
    assert from_similarity(EXAMPLE, tau) == pytest.approx(every, abs=1e-9)
    assert from_similarity(EXAMPLE, tau, denominator="negatives") == pytest.approx(negatives, abs=1e-9)


def test_small_example_one_way():
    assert from_similarity(EXAMPLE, 1.0, symmetric=False) == pytest.approx(0.6405375649, abs=1e-9)
    one_way = from_similarity(EXAMPLE, 1.0, symmetric=False, denominator="negatives")
    assert one_way == pytest.approx(-0.1090570371, abs=1e-9)


def test_infonce_is_softplus_of_the_printed_form():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        s = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        for i in range(3):  # per query: exclude the other queries by taking single rows
            logits = s[i] / 0.2
            printed = torch.logsumexp(torch.cat([logits[:i], logits[i + 1 :]]), 0) - logits[i]
            infonce = torch.logsumexp(logits, 0) - logits[i]
            assert float(F.softplus(printed)) == pytest.approx(float(infonce), abs=1e-12)
        means = [
            float(torch.stack([torch.logsumexp(row / 0.2, 0) - row[i] / 0.2 for i, row in enumerate(m)]).mean())
            for m in (s, s.T)
        ]
        assert from_similarity(s, 0.2) == pytest.approx(sum(means) / 2, abs=1e-12)


def test_gradient_of_the_positive_is_constant_in_the_printed_form():
    identity = torch.eye(3, dtype=torch.float64)
    s = EXAMPLE.clone().requires_grad_()
    loss = contrastive_loss(s, identity, scale=2.0, normalise=False, denominator="negatives")
    (gradient,) = torch.autograd.grad(loss, s)
    # Two directions of -1 / (2 τ) each, and the mean over three queries.
    torch.testing.assert_close(torch.diagonal(gradient), torch.full((3,), -2.0 / 3, dtype=torch.float64))


def test_one_spot():
    x = torch.ones(1, 4)
    assert float(contrastive_loss(x, x)) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(InputError, match="needs at least one negative"):
        contrastive_loss(x, x, denominator="negatives")


def test_invariances():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    reference = contrastive_loss(a, b)
    torch.testing.assert_close(contrastive_loss(a[order], b[order]), reference)
    torch.testing.assert_close(contrastive_loss(3 * a, 0.2 * b), reference)
    torch.testing.assert_close(contrastive_loss(b, a), reference)
    one_way = contrastive_loss(a, b, symmetric=False)
    assert not torch.allclose(contrastive_loss(b, a, symmetric=False), one_way)


def test_half_precision_is_summed_in_single():
    a = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    reference = contrastive_loss(a.bfloat16().float(), a.bfloat16().float())
    loss = contrastive_loss(a.bfloat16(), a.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference)


def test_shapes_are_checked():
    with pytest.raises(InputError, match="of one shape"):
        contrastive_loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match="denominator='negative' is unknown. Did you mean 'negatives'"):
        contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), denominator="negative")


def batch_of_two_slides() -> Batch:
    return Batch(
        slide_id=torch.tensor([0, 0, 0, 1]),
        index=torch.tensor([0, 1, 5, 0]),
        niche_index=torch.tensor([[1, 2, -1], [0, 3, -1], [6, 7, -1], [1, 2, -1]]),
    )


def test_negatives_of_the_same_slide():
    assert excluded_pairs(batch_of_two_slides()) is None
    excluded = excluded_pairs(batch_of_two_slides(), negatives="slide")
    assert excluded is not None
    expected = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    torch.testing.assert_close(excluded, expected)


def test_overlapping_niches_are_left_out():
    excluded = excluded_pairs(batch_of_two_slides(), mask_overlap=True)
    assert excluded is not None
    # Spots 0 and 1 share spots 0 and 1; the same numbers on the other slide are other spots, and -1 is nobody.
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    torch.testing.assert_close(excluded, expected)


def test_excluded_pairs_change_the_denominator_and_never_the_positive():
    excluded = torch.ones(3, 3, dtype=torch.bool)
    excluded[0, 1] = False
    every = from_similarity(EXAMPLE, 1.0, symmetric=False, excluded=excluded)
    first = math.log(math.exp(1.0) + math.exp(0.5)) - 1.0
    assert every == pytest.approx(first / 3, abs=1e-12)
    negatives = from_similarity(EXAMPLE, 1.0, symmetric=False, excluded=excluded, denominator="negatives")
    assert negatives == pytest.approx(0.5 - 1.0, abs=1e-12)  # the two queries without negatives are left out


def test_what_negatives_need_is_said():
    with pytest.raises(InputError, match="no 'slide_id'"):
        excluded_pairs(Batch(), negatives="slide")
    with pytest.raises(InputError, match="no 'niche_index'"):
        excluded_pairs(Batch(slide_id=torch.zeros(2, dtype=torch.long), index=torch.arange(2)), mask_overlap=True)


def test_temperature_is_learned_and_clamped():
    temperature = Temperature(0.07)
    assert float(temperature().detach()) == pytest.approx(1 / 0.07, rel=1e-6)
    assert [p.shape for p in temperature.parameters()] == [torch.Size([])]
    with torch.no_grad():
        temperature.log_scale.fill_(50.0)
    assert float(temperature().detach()) == pytest.approx(100.0, rel=1e-5)
    fixed = Temperature(0.5, learned=False)
    assert list(fixed.parameters()) == []
    assert "log_scale" in fixed.state_dict()
    with pytest.raises(InputError, match="between 0.01 and 1.0"):
        Temperature(5.0)
    with pytest.raises(InputError, match="greater than 0"):
        Temperature(-1.0, learned=False)


def test_weights_of_equation_12():
    losses = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    total = weighted_total(*losses, lambda1=1 / 3, lambda2=1 / 3)
    assert float(total) == pytest.approx(3.0, abs=1e-12)
    assert float(weighted_total(*losses, lambda1=0.5, lambda2=0.5)) == pytest.approx(1.5)
    with pytest.raises(InputError, match="at most 1"):
        check_weights(0.7, 0.4)
    with pytest.raises(InputError, match="lambda2 must lie between"):
        check_weights(0.2, -0.1)


# One of two devices with 3 and 2 spots; a program of its own, since a spawned process cannot import this module.
WORKER = """
import sys
import torch
from stfm.nn.batch import Batch
from stfm.nn.losses import contrastive_loss, excluded_pairs

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
slide = torch.tensor([0, 0, 1, 1, 0])
rows = slice(0, 3) if rank == 0 else slice(3, 5)
weight = torch.eye(4, dtype=torch.float64, requires_grad=True)
excluded = excluded_pairs(Batch(slide_id=slide[rows]), negatives="slide")
loss = contrastive_loss(x[rows] @ weight, y[rows], excluded=excluded) * (len(x[rows]) / 5)
loss.backward()
torch.distributed.all_reduce(weight.grad)
total = loss.detach().clone()
torch.distributed.all_reduce(total)
torch.save((total, weight.grad), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_candidates_come_from_all_devices(tmp_path: Path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    devices = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [device.communicate(timeout=300)[1] for device in devices]
    assert [device.returncode for device in devices] == [0, 0], "\n".join(errors)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.eye(4, dtype=torch.float64, requires_grad=True)
    excluded = excluded_pairs(Batch(slide_id=torch.tensor([0, 0, 1, 1, 0])), negatives="slide")
    loss = contrastive_loss(x @ weight, y, excluded=excluded)
    loss.backward()
    for rank in range(2):
        total, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(total, loss.detach())
        torch.testing.assert_close(gradient, weight.grad)
