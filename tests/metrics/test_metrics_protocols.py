"""Splits that refuse leakage by name, and protocols that say what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from stfm import metrics
from stfm.errors import InputError, MissingKeyError

SECTIONS = ["C2", "C2", "C3", "C4", "B4", "B4"]
PATIENTS = ["C", "C", "C", "C", "B", "B"]


def test_leave_one_out_covers_every_row_once():
    splits = metrics.leave_one_group_out(SECTIONS)
    assert [s.name for s in splits] == ["C2", "C3", "C4", "B4"]
    assert sorted(np.concatenate([s.test for s in splits])) == list(range(6))
    assert all(set(s.train) | set(s.test) == set(range(6)) for s in splits)


def test_sections_of_one_patient_on_both_sides_are_named():
    with pytest.raises(InputError, match="patient 'C' is in training and test"):
        metrics.leave_one_group_out(SECTIONS, patients=PATIENTS)
    assert len(metrics.leave_one_group_out(PATIENTS, patients=PATIENTS)) == 2
    with pytest.raises(InputError, match="section 'a', 'b' are in training and test; split by section"):
        metrics.check_leakage(["a", "b", "c"], ["b", "a"], what="section")
    metrics.check_leakage(["a"], ["b"])


@given(st.lists(st.integers(0, 7), min_size=20, max_size=80), st.integers(2, 4), st.integers(0, 5))
def test_folds_never_cut_a_group(groups: list[int], n_splits: int, seed: int):
    if len(set(groups)) < n_splits:
        with pytest.raises(InputError, match="cannot fill"):
            metrics.k_fold(groups, n_splits, rng=seed)
        return
    labels = np.array(groups)
    splits = metrics.k_fold(groups, n_splits, rng=seed)
    assert sorted(np.concatenate([s.test for s in splits])) == list(range(len(groups)))
    for split in splits:
        assert len(split.test)
        assert not set(labels[split.train]) & set(labels[split.test])


def test_spots_within_slides_is_the_papers_split():
    slides = np.repeat(["a", "b"], [50, 100])
    splits = metrics.spots_within_slides(slides, rng=3)
    assert [(len(s.train), len(s.test)) for s in splits] == [(40, 10), (80, 20)]
    assert all(set(slides[s.train]) == set(slides[s.test]) == {s.name} for s in splits)
    again = metrics.spots_within_slides(slides, rng=3)
    np.testing.assert_array_equal(splits[1].test, again[1].test)


def test_guards_of_splits():
    with pytest.raises(InputError, match="one group only"):
        metrics.leave_one_group_out(["a", "a"])
    with pytest.raises(InputError, match="missing for 1 rows"):
        metrics.k_fold(["a", None, "b"])
    with pytest.raises(InputError, match="patients has 2 labels for 6 rows"):
        metrics.leave_one_group_out(SECTIONS, patients=["a", "b"])
    with pytest.raises(InputError, match="one label a row"):
        metrics.leave_one_group_out([])
    with pytest.raises(InputError, match="too few for test_fraction"):
        metrics.spots_within_slides(["a", "b"])
    with pytest.raises(InputError, match="test_fraction must lie"):
        metrics.spots_within_slides(["a"] * 9, test_fraction=1.0)


def test_the_table_lists_every_protocol():
    table = metrics.protocols()
    assert set(table.index) == {
        "her2st-C-loso", "her2st-C-to-B4", "mob-loso", "mob-animal1-to-2", "mob-animal2-to-1", "dlpfc-loso",
        "spots-80-20", "dlpfc-domains",
    }  # fmt: skip
    assert table.loc["her2st-C-to-B4", "unit"] == "patient"
    assert metrics.get_protocol("her2st-C-to-B4").sections == ("C2", "C3", "C4", "C5", "B4")
    with pytest.raises(MissingKeyError, match="Did you mean 'mob-loso'"):
        metrics.get_protocol("mob-lose")


@pytest.mark.parametrize("name", ["her2st-C-loso", "her2st-C-to-B4", "mob-loso", "mob-animal1-to-2", "dlpfc-loso"])
def test_no_section_trains_and_is_tested(name: str):
    for fold in metrics.get_protocol(name).folds:
        metrics.check_leakage(list(fold.train), list(fold.test), what="section")


def test_genes_are_chosen_by_variance_among_those_detected():
    rng = np.random.default_rng(0)
    counts = rng.poisson(5.0, size=(200, 6))
    counts[:, 4] = 0
    counts[:15, 4] = 500  # of huge variance, but seen in 7.5 % of the spots
    counts[:, 2] = rng.choice([0, 60], size=200)
    parts = [counts[:90], sparse.csr_matrix(counts[90:])]
    chosen = metrics.select_genes(parts, 3)
    values = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    expected = [j for j in np.argsort(-values.var(axis=0)) if j != 4][:3]
    assert chosen.tolist() == expected
    assert chosen[0] == 2
    assert len(metrics.select_genes(parts, "hvg250")) == 5
    assert metrics.select_genes(parts, 1, by="mean")[0] != 4


def test_size_factors_may_come_from_all_measured_genes():
    counts = np.random.default_rng(0).poisson(4.0, size=(50, 8))
    totals = counts.sum(axis=1)
    subset = metrics.select_genes([counts[:, :5]], 5, totals=[totals])
    values = np.log1p(1e4 * counts / totals[:, None])[:, :5]
    assert subset.tolist() == np.argsort(-values.var(axis=0)).tolist()


def test_guards_of_genes():
    with pytest.raises(InputError, match="training sections with the same genes"):
        metrics.select_genes([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(InputError, match="no gene is detected"):
        metrics.select_genes([np.zeros((5, 3))])
    with pytest.raises(InputError, match="n_genes='hvg25' is unknown"):
        metrics.select_genes([np.ones((5, 3))], "hvg25")
