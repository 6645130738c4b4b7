"""Likelihoods of expression against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stfm.nn.counts import counts_of, expression_of_rate, gaussian_nll, negative_binomial_nll, poisson_nll

POSITIVE = st.floats(1e-3, 1e3)
COUNT = st.integers(0, 2000)


@given(count=COUNT, mean=POSITIVE, theta=st.floats(0.05, 1e3))
@settings(max_examples=60, deadline=None)
def test_negative_binomial(count: int, mean: float, theta: float):
    value = negative_binomial_nll(*(torch.tensor(v) for v in (float(count), np.log(mean), np.log(theta))))
    expected = -stats.nbinom.logpmf(count, theta, theta / (theta + mean))
    assert float(value) == pytest.approx(expected, rel=2e-4, abs=2e-2)  # float32: lgamma of 2000 has no more digits


@given(count=COUNT, mean=POSITIVE)
@settings(max_examples=60, deadline=None)
def test_poisson(count: int, mean: float):
    value = poisson_nll(torch.tensor(float(count)), torch.tensor(np.log(mean)))
    assert float(value) == pytest.approx(-stats.poisson.logpmf(count, mean), rel=1e-4, abs=1e-2)


@given(x=st.floats(-5, 5), mean=st.floats(-5, 5), deviation=st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_gaussian_but_for_its_constant(x: float, mean: float, deviation: float):
    value = gaussian_nll(torch.tensor(x), torch.tensor(mean), torch.tensor(2 * np.log(deviation)))
    expected = -stats.norm.logpdf(x, mean, deviation) - 0.5 * np.log(2 * np.pi)
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_probabilities_sum_to_one():
    counts = torch.arange(4000.0)
    log_mean, log_theta = torch.tensor(np.log(20.0)), torch.tensor(np.log(1.5))
    assert float((-negative_binomial_nll(counts, log_mean, log_theta)).exp().sum()) == pytest.approx(1.0, abs=1e-3)
    assert float((-poisson_nll(counts[:200], log_mean)).exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_large_dispersion_is_poisson():
    counts, log_mean = torch.arange(10.0), torch.tensor(1.0)
    wide = negative_binomial_nll(counts, log_mean, torch.tensor(np.log(1e4), dtype=torch.float32))
    torch.testing.assert_close(wide, poisson_nll(counts, log_mean), atol=2e-2, rtol=2e-2)


def test_extreme_rates_stay_finite():
    for log_mean in (-200.0, 80.0):
        mean = torch.tensor(log_mean, requires_grad=True)
        theta = torch.tensor(0.0, requires_grad=True)
        loss = negative_binomial_nll(torch.tensor(3.0), mean, theta) + poisson_nll(torch.tensor(3.0), mean)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(mean.grad)
        assert torch.isfinite(theta.grad)


def test_counts_come_back_from_log_normalised_values():
    counts = torch.poisson(torch.full((6, 30), 4.0))
    totals = counts.sum(dim=1) + 500  # genes outside the vocabulary belong to the total
    log_normalised = torch.log1p(1e4 * counts / totals[:, None])
    torch.testing.assert_close(counts_of(log_normalised, totals), counts, atol=1e-3, rtol=1e-4)
    rate = (counts / totals[:, None]).clamp_min(1e-12)
    torch.testing.assert_close(expression_of_rate(rate.log()), log_normalised, atol=1e-5, rtol=1e-4)
    assert float(expression_of_rate(torch.tensor(5.0))) == pytest.approx(np.log1p(1e4))  # no gene has more than all
