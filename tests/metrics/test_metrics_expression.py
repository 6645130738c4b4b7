"""Gene-wise scores: what a constant counts, what a slide is, what noise leaves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from stfm import metrics
from stfm.errors import InputError

FINITE = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 3))


def _tables(rng: np.random.Generator, n: int = 60, g: int = 4) -> tuple[np.ndarray, np.ndarray]:
    truth = rng.normal(size=(n, g))
    return truth, 0.5 * truth + rng.normal(size=(n, g))


def test_agrees_with_numpy():
    truth, guess = _tables(np.random.default_rng(0))
    expected = [np.corrcoef(truth[:, j], guess[:, j])[0, 1] for j in range(4)]
    np.testing.assert_allclose(metrics.gene_pearson(truth, guess), expected, atol=1e-12)
    np.testing.assert_allclose(metrics.gene_mse(truth, guess), ((truth - guess) ** 2).mean(axis=0))


def test_constant_prediction_is_zero_unless_asked_otherwise():
    truth, guess = _tables(np.random.default_rng(1))
    guess[:, 2] = 0.1 + 0.2
    assert metrics.gene_pearson(truth, guess)[2] == 0
    assert np.isnan(metrics.gene_pearson(truth, guess, constant="nan")[2])
    assert np.isfinite(metrics.gene_pearson(truth, guess, constant="nan")[[0, 1, 3]]).all()
    with pytest.raises(InputError, match="1 genes are constant in a slide"):
        metrics.gene_pearson(truth, guess, constant="raise")


def test_pooling_rewards_telling_slides_apart():
    # two slides with an offset of 3 and independent values inside: pooled .71, per slide about 0
    rng = np.random.default_rng(0)
    slides = np.repeat(["a", "b"], 4000)
    offset = np.where(slides == "a", 0.0, 3.0)[:, None]
    truth, guess = rng.normal(size=(8000, 1)) + offset, rng.normal(size=(8000, 1)) + offset
    assert metrics.gene_pearson(truth, guess, slides=slides, scope="pooled")[0] == pytest.approx(0.69, abs=0.03)
    assert metrics.gene_pearson(truth, guess, slides=slides)[0] == pytest.approx(0.0, abs=0.03)


def test_nan_policy_averages_over_the_slides_where_r_exists():
    truth, guess = _tables(np.random.default_rng(2), n=40, g=1)
    slides = np.repeat(["a", "b"], 20)
    guess[:20] = 1.0
    second = metrics.gene_pearson(truth[20:], guess[20:])[0]
    assert metrics.gene_pearson(truth, guess, slides=slides, constant="nan")[0] == pytest.approx(second)
    assert metrics.gene_pearson(truth, guess, slides=slides)[0] == pytest.approx(second / 2)


@given(hnp.arrays(np.float64, (12, 2), elements=FINITE), hnp.arrays(np.float64, (12, 2), elements=FINITE))
def test_pearson_is_bounded_symmetric_and_free_of_scale(a: np.ndarray, b: np.ndarray):
    r = metrics.gene_pearson(a, b)
    assert (np.abs(r) <= 1).all()
    np.testing.assert_allclose(r, metrics.gene_pearson(b, a), atol=1e-9)
    np.testing.assert_allclose(metrics.gene_pearson(4.0 * a, b), r, atol=1e-6)


@pytest.mark.parametrize(
    ("truth", "guess", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 3)), "they must agree"),
        (np.ones((0, 2)), np.ones((0, 2)), "a row a spot"),
        (np.full((3, 1), np.nan), np.ones((3, 1)), "measured holds nan"),
        (np.ones((3, 1)), np.full((3, 1), np.inf), "predicted holds nan"),
    ],
)
def test_bad_tables_are_refused(truth: np.ndarray, guess: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        metrics.gene_pearson(truth, guess)


def test_other_guards():
    truth, guess = _tables(np.random.default_rng(0))
    with pytest.raises(InputError, match="different columns"):
        metrics.gene_mse(pd.DataFrame(truth, columns=list("abcd")), pd.DataFrame(guess, columns=list("abdc")))
    with pytest.raises(InputError, match="slides must name the slide of each of the 60 spots"):
        metrics.gene_pearson(truth, guess, slides=["a"])
    with pytest.raises(InputError, match="scope='mean' is unknown"):
        metrics.gene_pearson(truth, guess, scope="mean")
    with pytest.raises(InputError, match="ceiling has shape"):
        metrics.expression_scores(truth, guess, ceiling=[0.5])


def test_table_of_scores():
    truth, guess = _tables(np.random.default_rng(3))
    table = metrics.expression_scores(
        pd.DataFrame(truth, columns=list("abcd")), guess, ceiling=[0.5, 0.5, 0.5, 0.0], slides=["s"] * 60
    )
    assert list(table.columns) == ["r", "r_pooled", "mse", "ceiling", "share"]
    assert table.index.tolist() == list("abcd")
    np.testing.assert_allclose(table["share"][:3], table["r"][:3] / 0.5)
    assert np.isnan(table["share"]["d"])


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csr_array])
def test_thinned_halves_add_up(kind):
    counts = np.random.default_rng(0).poisson(3.0, size=(30, 7))
    first, second = metrics.thin(kind(counts), rng=1)
    whole = first + second
    np.testing.assert_array_equal(whole.toarray() if sparse.issparse(whole) else whole, counts)


def test_ceiling_is_the_correlation_with_the_noise_free_values():
    rng = np.random.default_rng(0)
    rate = rng.gamma(2.0, 1.5, size=(3000, 20))
    rate *= 200 / rate.sum(axis=1, keepdims=True)
    counts = rng.poisson(rate)
    measured, true = (np.log1p(1e4 * table / table.sum(axis=1, keepdims=True)) for table in (counts, rate))
    ideal = metrics.gene_pearson(measured, true)
    ceiling = metrics.noise_ceiling(counts, n_splits=3)
    assert ceiling.mean() == pytest.approx(ideal.mean(), abs=0.03)
    assert metrics.noise_ceiling(sparse.csr_matrix(counts), columns=[3, 1], n_splits=1).shape == (2,)


def test_ceiling_needs_counts():
    with pytest.raises(InputError, match="raw counts"):
        metrics.noise_ceiling(np.full((4, 2), 0.5))


@pytest.mark.parametrize(("name", "expected"), [("her2st-C-to-B4", 0.609), ("dlpfc-loso", 0.516)])
def test_ceilings_of_the_real_sections(shared_data, name: str, expected: float):
    import anndata as ad

    read = lambda key: ad.read_h5ad(shared_data / "h5ad" / f"{key}.h5ad")  # noqa: E731
    if name == "dlpfc-loso":
        train, tests = [read("dlpfc_151674"), read("dlpfc_151675")], [read("dlpfc_151673")]
    else:
        train, tests = [read("her2st_C2")], [read("her2st_B4")]
    shared = train[0].var_names
    for other in (*train[1:], *tests):
        shared = shared[shared.isin(other.var_names)]
    totals = [np.asarray(a.X.sum(axis=1)).ravel() for a in train]
    genes = metrics.select_genes([a[:, shared].X for a in train], totals=totals)
    test = tests[0]
    columns = test.var_names.get_indexer(shared[genes])
    assert metrics.noise_ceiling(test.X, columns=columns, n_splits=2).mean() == pytest.approx(expected, abs=0.025)
