"""Agreement of labels: values known analytically."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfm import metrics
from stfm.errors import InputError

NAMES = ("ARI", "NMI", "AMI", "FMI", "HOM", "COM")
CASES = [
    ("001122", "110022", (1, 1, 1, 1, 1, 1)),
    ("0012", "0011", (0.571429, 0.8, 0.571429, 0.707107, 0.666667, 1)),
    ("0011", "0101", (-0.5, 0, -0.5, 0, 0, 0)),
    ("0011", "0000", (0, 0, 0, 0.577350, 0, 1)),
    ("0011", "0123", (0, 0.666667, 0, 0, 1, 0.5)),
    ("111222333", "112223331", (0.111111, 0.420620, 0.165023, 0.333333, 0.420620, 0.420620)),
]


@pytest.mark.parametrize(("truth", "found", "expected"), CASES)
def test_known_values(truth: str, found: str, expected: tuple[float, ...]):
    scores = metrics.domain_scores(list(truth), list(found))
    assert tuple(scores) == NAMES
    np.testing.assert_allclose(list(scores.values()), expected, atol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.randoms())
def test_names_of_domains_do_not_matter(labels: list[int], random):
    names = list("wxyz")
    random.shuffle(names)
    assert metrics.ari(labels, [names[label] for label in labels]) == 1


def test_unlabelled_spots_are_left_out_at_scoring_only():
    truth = pd.Series(["a", "a", None, "b", "undetermined", "b", np.nan], dtype="object")
    found = ["0", "0", "1", "1", "0", "1", "0"]
    assert metrics.ari(truth, found) == 1
    assert metrics.ari(truth.astype("category"), pd.Categorical(found)) == 1
    assert metrics.ari(truth, found, ignore=()) < 1


def test_coherence_of_a_checkerboard_and_of_halves():
    x, y = np.meshgrid(np.arange(20.0), np.arange(20.0))
    coords = np.column_stack([x.ravel(), y.ravel()])
    halves = (coords[:, 0] >= 10).astype(int)
    board = ((coords[:, 0] + coords[:, 1]) % 2).astype(int)
    smooth, rough = (metrics.domain_scores(halves, labels, coords=coords) for labels in (halves, board))
    assert smooth["PAS"] < 0.05
    assert smooth["CHAOS"] == pytest.approx(1 / coords[:, 0].std())
    assert rough["CHAOS"] == pytest.approx(np.sqrt(2) / coords[:, 0].std())
    # of the ten nearest of an inner spot of a board, four touch it along an edge and are of the other colour
    assert rough["PAS"] < 0.2
    noise = np.random.default_rng(0).integers(0, 5, len(coords))
    assert metrics.pas(noise, coords) > 0.8
    assert metrics.chaos(halves, 7.5 * coords) == pytest.approx(smooth["CHAOS"])


def test_guards():
    with pytest.raises(InputError, match="labels of the same spots"):
        metrics.ari([1, 2], [1])
    with pytest.raises(InputError, match="no spot has a true label"):
        metrics.nmi([None, "nan"], [1, 1])
    with pytest.raises(InputError, match="1 labelled spots have no found domain"):
        metrics.ami(["a", "b"], ["x", None])
    with pytest.raises(InputError, match="one row for each of the 2 labels"):
        metrics.chaos([0, 1], np.zeros((3, 2)))
    with pytest.raises(InputError, match="alone in its domain"):
        metrics.chaos([0, 1], np.zeros((2, 2)))
    with pytest.raises(InputError, match="nan or infinite"):
        metrics.chaos([0, 0], [[0.0, np.nan], [1.0, 1.0]])
    with pytest.raises(InputError, match="too few for n_neighbors=10"):
        metrics.pas([0, 1], [[0.0, 0.0], [1.0, 1.0]])
