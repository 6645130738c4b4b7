"""A trained model goes on with slides of another panel."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import stfm as sf
from stfm._errors import InputError


@pytest.mark.slow
def test_fine_tuning_learns_genes_of_the_new_slides():
    both = sf.datasets.toy(n_spots=60, n_patients=2, image=False)
    one = both[both.obs["library_id"] == "section_1"].copy()
    other = both[both.obs["library_id"] == "section_2"].copy()
    names = both.var_names.to_numpy()
    new = [str(name) for name in names[:40]]
    few = one[:, 40:].copy()
    short = {"epochs": 1, "batch_size": 32, "stage": "mask", "validation": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sf.tl.train(few, "storm-tiny", config={"ablation": "no-image"}, genes=[str(n) for n in names], **short)
        with pytest.raises(InputError, match="no training slide had measured it"):
            sf.tl.impute(other, model, genes=new[:2])
        tuned = sf.tl.train(other, init=model, **short)
    assert int(model.written_genes().sum()) == len(names) - 40
    assert tuned.written_genes().all()
    sf.tl.impute(other, tuned, genes=new)
    assert np.isfinite(other.obsm["imputed"].to_numpy()).all()
