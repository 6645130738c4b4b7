"""Domains: found where they are, written where they belong, and nothing is written after an error."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from stfm import metrics, tl
from stfm.errors import InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.inference.domains import cluster, majority, reduce
from stfm.inference.rings import ring_graphs, ring_means


def _tissue(side: int = 18, noise: float = 1.0, seed: int = 0) -> ad.AnnData:
    """A square lattice of three stripes, each with a mean of its own in an embedding of 8 numbers."""
    rng = np.random.default_rng(seed)
    x, y = (c.ravel().astype(float) for c in np.meshgrid(np.arange(side), np.arange(side)))
    truth = np.minimum((3 * x / side).astype(int), 2)
    centres = 3 * rng.normal(size=(3, 8))
    adata = ad.AnnData(np.ones((side * side, 2), np.float32))
    adata.obsm["X_stfm"] = (centres[truth] + noise * rng.normal(size=(side * side, 8))).astype(np.float32)
    adata.obsm["spatial"] = np.column_stack([x, y]) * 100
    adata.obs["truth"] = truth.astype(str)
    return adata


@pytest.mark.parametrize("method", ["gmm", "consensus", "kmeans", "leiden"])
def test_finds_the_stripes(method: str):
    adata = _tissue()
    assert tl.spatial_domains(adata, 3, method=method) is None
    assert metrics.ari(adata.obs["truth"], adata.obs["spatial_domain"]) > 0.9
    assert adata.obs["spatial_domain"].cat.categories.tolist() == ["0", "1", "2"]
    assert adata.obs["spatial_domain"].value_counts(sort=False).is_monotonic_decreasing
    assert len(adata.uns["spatial_domain_colors"]) == 3
    params = adata.uns["spatial_domain"]["params"]
    assert (params["method"], params["n_domains"], params["use_rep"]) == (method, 3, "X_stfm")


def test_same_seed_same_domains_and_copy_leaves_the_object_alone(tmp_path):
    adata = _tissue(noise=4.0)
    first = tl.spatial_domains(adata, 3, rng=1, copy=True)
    second = tl.spatial_domains(adata, 3, rng=1, copy=True, key_added="again")
    assert "spatial_domain" not in adata.obs
    assert list(first.obs["spatial_domain"]) == list(second.obs["again"])
    assert "again_colors" in second.uns
    first.write_h5ad(tmp_path / "a.h5ad")
    assert "spatial_domain" in ad.read_h5ad(tmp_path / "a.h5ad").uns


def test_neighbours_help_where_noise_is_large():
    adata = _tissue(noise=6.0)
    scores = []
    for key, options in {"plain": {}, "refined": {"refine": "majority"}, "smooth": {"smooth_rings": 1}}.items():
        tl.spatial_domains(adata, 3, key_added=key, **options)
        scores.append(metrics.ari(adata.obs["truth"], adata.obs[key]))
    assert scores[0] < scores[1]
    assert scores[0] + 0.2 < scores[2]


def test_refinement_follows_the_niche_table_where_there_is_one():
    adata = _tissue(side=6)
    adata.obsp["links"] = sparse.csr_matrix((36, 36), dtype=np.float32)
    adata.uns["niche"] = {"connectivities_key": "links", "distances_key": "links"}
    plain = tl.spatial_domains(adata, 3, copy=True)
    alone = tl.spatial_domains(adata, 3, refine=True, copy=True)
    assert list(plain.obs["spatial_domain"]) == list(alone.obs["spatial_domain"])


def test_domains_have_one_name_in_all_libraries():
    adata = ad.concat({"a": _tissue(side=9), "b": _tissue(side=9)}, label="library_id", index_unique="-")
    tl.spatial_domains(adata, 3, refine=True)
    first, second = (adata.obs["spatial_domain"][adata.obs["library_id"] == name].to_numpy() for name in "ab")
    assert (first == second).all()


def test_a_view_becomes_an_object_of_its_own():
    adata = _tissue()
    view = adata[:200]
    with pytest.warns(StfmWarning, match="view of another object"):
        tl.spatial_domains(view, 2)
    assert "spatial_domain" not in adata.obs
    assert not view.is_view


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_rep": "X_pca"}, MissingKeyError, "no 'X_pca'.*sf.tl.embed"),
        ({"method": "mclust"}, InputError, "method='mclust' is unknown"),
        ({"refine": "spatial"}, InputError, "refine='spatial' is unknown"),
        ({"covariance": "round"}, InputError, "covariance='round' is unknown"),
        ({"n_domains": 0}, InputError, "n_domains must be at least 1"),
        ({"n_domains": 1000}, InputError, "more than the 324 spots"),
        ({"smooth_rings": -1}, InputError, "smooth_rings must be at least 0"),
        ({"smooth_rings": 1, "spatial_key": "xy"}, MissingKeyError, "obsm has no 'xy'"),
        ({"use_rep": "bad"}, InputError, "must be a finite table"),
        ({"key_added": "X_stfm"}, InputError, "is the name of another result"),
    ],
)
def test_bad_input_leaves_the_object_untouched(options: dict, error: type, message: str):
    adata = _tissue()
    adata.obsm["bad"] = np.full((adata.n_obs, 2), np.nan)
    adata.uns["X_stfm"] = {"params": {"model": "mine"}}
    before = (list(adata.obs), list(adata.uns))
    with pytest.raises(error, match=message):
        tl.spatial_domains(adata, **{"n_domains": 3, **options})
    assert (list(adata.obs), list(adata.uns)) == before


def test_other_types_are_refused():
    with pytest.raises(WrongTypeError, match="must be AnnData, got ndarray"):
        tl.spatial_domains(np.zeros((3, 2)), 2)


def test_one_domain_and_no_variance():
    adata = _tissue(side=4)
    tl.spatial_domains(adata, 1)
    assert set(adata.obs["spatial_domain"]) == {"0"}
    with pytest.raises(InputError, match="the same for every spot"):
        cluster(np.ones((5, 3)), 2)


def test_components_carry_the_distances():
    values = np.random.default_rng(0).normal(size=(30, 6)) @ np.diag([5, 4, 3, 2, 1, 0.5])
    scores = reduce(values, None)
    np.testing.assert_allclose(scores.std(axis=0)[0], max(np.linalg.svd(values - values.mean(0))[1]) / np.sqrt(30))
    np.testing.assert_allclose(np.linalg.norm(scores[0] - scores[1]), np.linalg.norm(values[0] - values[1]))
    np.testing.assert_allclose(reduce(values, 3, whiten=True).var(axis=0, ddof=1), 1.0)


def test_leiden_says_when_it_cannot_hit_the_number():
    # 16 spots that are all neighbours of one another: one domain at low resolution, 16 at high
    points = np.random.default_rng(0).normal(size=(16, 3))
    with pytest.warns(StfmWarning, match=r"leiden found \d+ domains at best, not 5"):
        labels = cluster(points, 5, method="leiden")
    assert labels.max() + 1 != 5


def test_majority_by_hand():
    line = sparse.diags_array([1.0, 1.0], offsets=[-1, 1], shape=(5, 5)).tocsr()
    assert majority([0, 0, 1, 0, 0], line).tolist() == [0, 0, 0, 0, 0]
    assert majority([0, 0, 1, 1, 1], line).tolist() == [0, 0, 1, 1, 1]
    assert majority([0, 1], sparse.csr_matrix([[0.0, 1.0], [1.0, 0.0]])).tolist() == [0, 1]  # a tie stays


@pytest.mark.parametrize(("layout", "expected"), [("square", (8, 12)), ("hex", (6, 12))])
def test_rings_of_lattices(layout: str, expected: tuple[int, int]):
    row, column = (c.ravel().astype(float) for c in np.meshgrid(np.arange(11), np.arange(11)))
    points = np.column_stack([column, row])
    if layout == "hex":
        points = np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])
    rings = ring_graphs(points * 137.8, 2)
    middle = 5 * 11 + 5
    assert tuple(int(ring[middle].sum()) for ring in rings) == expected
    assert all((ring != ring.T).nnz == 0 and ring.diagonal().sum() == 0 for ring in rings)
    np.testing.assert_allclose(ring_means(points, rings[0])[middle], points[middle], rtol=1e-6)


def test_rings_without_a_lattice_and_without_neighbours():
    points = np.random.default_rng(0).random((60, 2))
    first, second = ring_graphs(points, 2, groups=["a"] * 30 + ["b"] * 30)
    assert set(np.asarray(first.sum(axis=1)).ravel()) == {6}
    assert set(np.asarray(second.sum(axis=1)).ravel()) == {12}
    assert first[:30, 30:].nnz == 0
    (alone,) = ring_graphs([[0.0, 0.0]], 1)
    np.testing.assert_array_equal(ring_means(np.array([[3.0]]), alone), [[3.0]])


def test_consensus_moves_less_with_the_seed_than_a_single_start():
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(300, 12)) * np.geomspace(3, 0.5, 12)  # no clusters: every start ends elsewhere
    agreement = {}
    for method in ("gmm", "consensus"):
        found = [cluster(embedding, 4, method=method, n_init=1 if method == "gmm" else 6, rng=s) for s in range(4)]
        agreement[method] = np.mean([metrics.ari(found[0].astype(str), other) for other in found[1:]])
    assert agreement["gmm"] + 0.1 < agreement["consensus"]
    twice = [cluster(embedding, 4, method="consensus", n_init=2, rng=3) for _ in range(2)]
    np.testing.assert_array_equal(*twice)
