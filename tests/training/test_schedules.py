"""Schedules against values worked out by hand."""

from __future__ import annotations

import pytest

from stfm._errors import InputError
from stfm.training.module import TrainingModule
from stfm.training.recipes import Recipe
from stfm.training.schedules import cosine, warmup_cosine


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.0), (20, 5e-5), (40, 1e-4), (280, 8.5355e-5), (520, 5e-5), (760, 1.4645e-5), (1000, 0.0), (2000, 0.0)],
)
def test_learning_rate(step, lr):
    assert warmup_cosine(step, 1000, peak=1e-4, warmup=40) == pytest.approx(lr, abs=1e-9)


@pytest.mark.parametrize(("share", "decay"), [(0, 0.04), (25, 0.0927208), (50, 0.22), (75, 0.3472793), (100, 0.4)])
def test_weight_decay(share, decay):
    assert cosine(share, 100, start=0.04, end=0.4) == pytest.approx(decay, abs=1e-7)


def test_final_value_and_no_warmup():
    assert warmup_cosine(0, 10, peak=1.0, final=0.1) == 1.0
    assert warmup_cosine(10, 10, peak=1.0, final=0.1) == pytest.approx(0.1)


def test_impossible_schedules_are_refused():
    with pytest.raises(InputError, match="positive number of steps"):
        cosine(0, 0, start=0, end=1)
    with pytest.raises(InputError, match="shorter than the schedule: 10 of 10"):
        warmup_cosine(0, 10, peak=1, warmup=10)


@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_no_step_of_a_run_has_rate_zero(total):
    from torch import nn

    recipe = Recipe(lr=1.0, warmup=0.1)
    module = TrainingModule(nn.Linear(2, 2), recipe, total_steps=total, slide_names=[])  # type: ignore[arg-type]
    rates = [module.rates(step) for step in range(total)]
    assert all(0 < lr <= 1 for lr, _ in rates)
    assert all(0.04 < decay < 0.4 for _, decay in rates)
