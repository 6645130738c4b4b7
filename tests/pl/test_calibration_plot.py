"""``pl.calibration``."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from stfm import pl
from stfm._errors import InputError, MissingKeyError, WrongTypeError

GENES = ["A", "B", "C"]


@pytest.fixture
def predicted() -> ad.AnnData:
    """Deviations of the right size for A and B, half of it for C."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(20.0, (400, 4)).astype(np.float32))
    adata.var_names = [*GENES, "REST"]
    measured = np.log1p(1e4 * adata.X / adata.X.sum(axis=1, keepdims=True))[:, :3]
    sd = np.full(measured.shape, 0.5)
    mean = measured + sd * rng.normal(size=sd.shape) * [1, 1, 2]
    for key, values in (("predicted_expression", mean), ("predicted_expression_sd", sd)):
        adata.obsm[key] = pd.DataFrame(values, index=adata.obs_names, columns=GENES)
    return adata


def curve(ax) -> np.ndarray:
    return next(line for line in ax.lines if line.get_linewidth() == 2.0).get_ydata()


def test_right_deviations_lie_on_the_diagonal(predicted: ad.AnnData):
    ax = pl.calibration(predicted, ["A", "B"])
    nominal = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(curve(ax), nominal, atol=0.06)
    assert (curve(pl.calibration(predicted, "C"))[5:] < nominal[5:] - 0.1).all()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["80 % of 2 genes", "all genes"]
    assert sum(t.get_text().startswith("80 %: ") for t in ax.texts) == 1
    assert ax.get_title() == "calibration"


def test_draws_into_what_is_given_and_says_what_was_seen(predicted: ad.AnnData):
    _, given = plt.subplots()
    predicted.uns["predicted_expression"] = {
        "libraries": ["a"], "seen_in_training": [True], "patient_seen_in_training": [True],
    }  # fmt: skip
    ax = pl.calibration(predicted, ax=given)
    assert ax is given
    assert ax.get_title() == "calibration (slide seen)"


def test_guards(predicted: ad.AnnData):
    for genes, said in (("D", "'D' was not predicted"), (["REST"], "'REST' was not predicted")):
        with pytest.raises(MissingKeyError, match=said):
            pl.calibration(predicted, genes)
    with pytest.raises(MissingKeyError, match="'A' was not measured"):
        pl.calibration(predicted[:, 1:].copy(), "A")
    with pytest.raises(InputError, match="none of the predicted genes was measured"):
        pl.calibration(predicted[:, 3:].copy())
    with pytest.raises(MissingKeyError, match="no 'counts'"):
        pl.calibration(predicted, layer="counts")
    del predicted.obsm["predicted_expression_sd"]
    with pytest.raises(MissingKeyError, match="no 'predicted_expression_sd'.*has no deviations"):
        pl.calibration(predicted)
    with pytest.raises(MissingKeyError, match="no 'p'"):
        pl.calibration(predicted, key="p")
    with pytest.raises(WrongTypeError, match="must be AnnData"):
        pl.calibration(3)
