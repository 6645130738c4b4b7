"""A result does not take the place of what it was made from."""

from __future__ import annotations

import numpy as np
import pytest

import stfm as sf
from stfm._errors import InputError

WRITERS = {
    "embed": sf.tl.embed,
    "predict_expression": lambda adata, **how: sf.tl.predict_expression(adata, model="default", **how),
    "impute": lambda adata, **how: sf.tl.impute(adata, "default", **how),
    "spatial_domains": lambda adata, **how: sf.tl.spatial_domains(adata, 2, **how),
    "attribute": lambda adata, **how: sf.tl.attribute(
        adata, "default", target="ERBB2", spots=adata.obs_names[0], **how
    ),
    "build_niches": sf.pp.build_niches,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "how",
    [
        {"key_added": "spatial"},
        {"key_added": "stfm"},
        {"key_added": "where", "spatial_key": "where"},
        {"key_added": "slice", "library_key": "slice"},
        {"key_added": "patient"},
    ],
    ids=lambda how: how["key_added"],
)
def test_a_result_does_not_overwrite_what_is_read(writer, how):
    adata = sf.datasets.toy(n_spots=20, n_genes=330)
    adata.obsm["where"] = adata.obsm["spatial"].copy()
    adata.obs["slice"] = "a"
    before = adata.copy()
    with pytest.raises(InputError, match=rf"key_added='{how['key_added']}' is where stfm reads .* another name"):
        WRITERS[writer](adata, **how)
    for slot in ("obs", "obsm", "obsp", "uns", "layers"):
        assert sorted(getattr(adata, slot)) == sorted(getattr(before, slot)), slot
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])
    assert list(adata.obs["patient"]) == list(before.obs["patient"])
    assert list(adata.uns["spatial"]) == list(before.uns["spatial"])
