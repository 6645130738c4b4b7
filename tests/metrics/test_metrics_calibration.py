"""Coverage of predicted intervals: exact on small tables, right on normal errors, wrong where it should be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stfm import metrics
from stfm._errors import InputError


def test_counts_what_lies_inside():
    measured = pd.DataFrame({"A": [0.0, 1.0, 2.0, 3.0], "B": [0.0, 0.0, 0.0, 9.0]})
    table = metrics.coverage(measured, np.zeros((4, 2)), np.ones((4, 2)), levels=[0.5, 0.8, 0.95])
    assert table.index.tolist() == ["A", "B", "overall"]
    assert table.columns.tolist() == [0.5, 0.8, 0.95]
    assert table.loc["A"].tolist() == [0.25, 0.5, 0.5]  # 0.67, 1.28 and 1.96 deviations
    assert table.loc["B"].tolist() == [0.75, 0.75, 0.75]
    assert table.loc["overall"].tolist() == [0.5, 0.625, 0.625]


@given(scale=st.floats(0.2, 5.0), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_normal_errors_are_covered_as_they_should(scale: float, seed: int):
    rng = np.random.default_rng(seed)
    sd = scale * (0.5 + rng.random((4000, 3)))
    mean = rng.normal(size=sd.shape)
    table = metrics.coverage(mean + sd * rng.normal(size=sd.shape), mean, sd)
    assert np.abs(table.to_numpy() - table.columns.to_numpy()).max() < 0.05
    surer = metrics.coverage(mean + sd * rng.normal(size=sd.shape), mean, sd / 2)
    assert (surer.loc["overall"] < table.loc["overall"] - 0.1).all()


def test_names():
    one = np.zeros((5, 2))
    assert metrics.coverage(one, one, one + 1).index.tolist() == [0, 1, "overall"]
    assert metrics.coverage(one, one, one + 1, genes=["X", "Y"]).index.tolist() == ["X", "Y", "overall"]
    assert metrics.coverage(one[:, 0], one[:, 0], one[:, 0] + 1, levels=[0.9]).shape == (2, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sd": np.zeros((5, 2))}, "sd must be positive everywhere, got 0"),
        ({"sd": np.full((5, 2), np.nan)}, "holds nan"),
        ({"sd": np.ones((5, 3))}, "must agree"),
        ({"mean": np.ones((4, 2))}, "must agree"),
        ({"levels": [0.5, 1.0]}, "levels must be numbers between 0 and 1"),
        ({"levels": []}, "levels must be numbers between 0 and 1"),
        ({"genes": ["X"]}, "genes names 1 columns, the tables have 2"),
    ],
)
def test_guards(options, said: str):
    tables = {"measured": np.zeros((5, 2)), "mean": np.zeros((5, 2)), "sd": np.ones((5, 2))}
    with pytest.raises(InputError, match=said):
        metrics.coverage(**{**tables, **options})
