"""Niches on arrays: exact, whatever the search, the order and the ties."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from stfm._errors import InputError, WrongTypeError
from stfm.slide._niche_grid import Grid
from stfm.slide._niche_tree import Tree
from stfm.slide._threads import run
from stfm.slide.niches import (
    NicheTable,
    Request,
    _search_compiled,
    _search_scipy,
    knn,
    knn_numpy,
    lattice_tolerance,
    niche_mean,
    niche_mean_numpy,
)

quick = settings(deadline=None, max_examples=40)


def hex_lattice(rows: int, columns: int, pitch: float = 100.0) -> np.ndarray:
    r, c = np.divmod(np.arange(rows * columns), columns)
    return np.column_stack([(c + 0.5 * (r % 2)) * pitch, r * pitch * np.sqrt(3) / 2])


def same(one: NicheTable, other: NicheTable) -> None:
    np.testing.assert_array_equal(one.index, other.index)
    np.testing.assert_array_equal(one.distance, other.distance)


@st.composite
def point_sets(draw, dims=(2, 3)):
    n = draw(st.integers(1, 60))
    dim = draw(st.sampled_from(dims))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["random", "whole", "crowded", "clustered", "outlier", "line"]))
    points = rng.random((n, dim)) * 100
    if kind == "whole":
        points = np.round(points)
    elif kind == "crowded":
        points = np.round(points / 30)
    elif kind == "clustered":
        points[: n // 2] *= 1e-3
    elif kind == "outlier":
        points[0] = 1e9
    elif kind == "line":
        points[:, 1:] = 0
    return points


class TestFacts:
    def test_line(self):
        table = knn(np.array([[0.0, 0], [1, 0], [2, 0], [10, 0]]), 3)
        assert table.index[0].tolist() == [1, 2, 3]
        assert table.distance[0].tolist() == [1, 2, 10]

    def test_hexagonal_shells(self):
        points = hex_lattice(9, 9)
        center = 4 * 9 + 4
        table = knn(points, 12)
        np.testing.assert_allclose(table.distance[center], [100] * 6 + [173.205] * 6, atol=1e-3)
        assert knn(points, 3, ties="all").index[center].size == 6
        assert (knn(points, 7, ties="all").index[center] >= 0).sum() == 12

    def test_three_of_six_are_the_lowest(self):
        points = hex_lattice(9, 9)
        six = np.sort(knn(points, 6).index[40])
        assert sorted(knn(points, 3).index[40]) == six[:3].tolist()


class TestAgainstTwin:
    @quick
    @given(
        points=point_sets(),
        k=st.sampled_from([1, 3, 6, None]),
        radius=st.sampled_from([None, 10.0, 40.0]),
        ties=st.sampled_from(["index", "all"]),
        tolerance=st.sampled_from([0.0, 2.5]),
        n_groups=st.integers(1, 3),
        include_self=st.booleans(),
    )
    def test_equal(self, points, k, radius, ties, tolerance, n_groups, include_self):
        if k is None and radius is None:
            radius = 20.0
        groups = np.arange(len(points)) % n_groups
        options = {"radius": radius, "ties": ties, "groups": groups, "include_self": include_self}
        same(
            knn(points, k, tie_tolerance=tolerance, **options),
            knn_numpy(points, k, tie_tolerance=tolerance, **options),
        )

    @pytest.mark.parametrize("kind", ["random", "whole", "hex", "disc"])
    def test_grid_equals_tree(self, kind):
        rng = np.random.default_rng(1)
        points = rng.random((6000, 2)) * 1000
        if kind == "whole":
            points = np.round(points)
        elif kind == "hex":
            points = rng.permutation(hex_lattice(80, 75))
        elif kind == "disc":
            points = points[np.hypot(*(points - 500).T) < 250]
        grid = Grid.build(points, 6, 2)
        assert grid is not None
        tree = Tree.build(points, 2)
        n = len(points)
        for request, capacity in ((Request(6), 6), (Request(6, ties="all"), 40), (Request(6, radius=15.0), 6)):
            found = []
            for searcher in (grid, tree):
                index = np.full((n, capacity), -1, np.int32)
                distance = np.full((n, capacity), np.inf, np.float32)
                blocks = np.arange(searcher.n_blocks, dtype=np.int32)
                short = np.zeros(n, bool)
                searcher.query(blocks, capacity, request.rule(capacity, 0.0), searcher.ids, index, distance, short)
                assert not short.any()
                found.append(NicheTable(index, distance))
            same(*found)

    def test_clustered_points_take_the_tree(self):
        rng = np.random.default_rng(2)
        points = rng.random((10, 2))[rng.integers(0, 10, 5000)] + rng.normal(0, 1e-4, (5000, 2))
        assert Grid.build(points, 6, 1) is None
        assert (knn(points, 6).index >= 0).all()

    @pytest.mark.parametrize("radius", [None, 0.05])
    @pytest.mark.parametrize("far", [30.0, 1e8, 1e30])
    def test_far_outliers_lie_in_the_border_of_the_grid(self, far, radius):
        points = np.random.default_rng(2).random((3000, 2))
        points[:7] = np.array([[1, 1], [1, 0.999], [-1, 0.5e-3], [0, -1], [0.3, 1], [-1, -1], [1, -1]]) * far
        points[:7] += 0.5
        assert Grid.build(points, 6, 1) is not None
        same(knn(points, 6, radius=radius), knn_numpy(points, 6, radius=radius))

    @quick
    @given(
        points=point_sets(),
        k=st.sampled_from([1, 3, 6, None]),
        radius=st.sampled_from([None, 10.0, 40.0]),
        ties=st.sampled_from(["index", "all"]),
        tolerance=st.sampled_from([None, 0.0, 2.5]),
    )
    def test_few_points_without_compiled_code(self, points, k, radius, ties, tolerance):
        radius = 20.0 if k is None and radius is None else radius
        request = Request(k, radius, ties, tolerance)
        one, other = _search_scipy(points, request, 1), _search_compiled(points, request, 1)
        same(one[0], other[0])
        assert one[1] == other[1]

    @pytest.mark.parametrize("ties", ["index", "all"])
    @pytest.mark.parametrize("k", [3, 6])
    def test_lattice_without_compiled_code(self, k, ties):
        points = np.random.default_rng(0).permutation(np.round(hex_lattice(60, 50, 137.3)))[:2500]
        one, other = (search(points, Request(k, ties=ties), 2) for search in (_search_scipy, _search_compiled))
        same(one[0], other[0])
        assert one[1] == other[1] > 0

    def test_a_crowd_needs_compiled_code(self):
        assert _search_scipy(np.zeros((2000, 2)), Request(3, ties="all"), 1) is None

    def test_few_points_load_no_numba(self):
        code = (
            "import sys, numpy as np; from stfm.slide.niches import knn; "
            "knn(np.random.default_rng(0).random((400, 2)), 6); sys.exit('numba' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_many_points_at_one_place(self):
        points = np.repeat([[1.0, 2.0], [5.0, 5.0]], 40, axis=0)
        same(knn(points, 3), knn_numpy(points, 3))
        everyone = knn(points, 3, ties="all")
        assert everyone.k == 39
        assert (everyone.distance == 0).all()

    def test_one_dense_place_among_many(self):
        # the sample that chooses how many candidates to hold may miss it: such spots are asked again
        points = np.vstack([np.random.default_rng(0).random((1500, 2)) * 1e4, np.full((200, 2), 7.0)])
        same(knn(points, 4, ties="all"), knn_numpy(points, 4, ties="all"))

    def test_threads_change_nothing(self):
        points = np.random.default_rng(3).random((9000, 2))
        same(knn(points, 5, n_jobs=1), knn(points, 5, n_jobs=3))


class TestInvariance:
    @quick
    @given(points=point_sets(), seed=st.integers(0, 99))
    def test_permutation(self, points, seed):
        order = np.random.default_rng(seed).permutation(len(points))
        one, other = knn(points, 4, tie_tolerance=0.0), knn(points[order], 4, tie_tolerance=0.0)
        np.testing.assert_array_equal(one.distance[order], other.distance)
        five = knn(points, 5, tie_tolerance=0.0).distance[order]
        sure = (five[:, 1:] != five[:, :-1]).all(axis=1)  # no ties
        np.testing.assert_array_equal(one.index[order][sure], np.where(other.index >= 0, order[other.index], -1)[sure])

    @quick
    @given(points=point_sets(), shift=st.integers(-(2**20), 2**20))
    def test_translation(self, points, shift):
        points = np.round(points)  # whole numbers move without rounding
        same(knn(points, 4), knn(points + shift, 4))

    @quick
    @given(points=point_sets(dims=(2,)))
    def test_flat_third_dimension(self, points):
        flat = np.column_stack([points, np.full(len(points), 3.0)])
        same(knn(points, 4), knn(flat, 4))

    @quick
    @given(points=point_sets(), n_groups=st.integers(2, 4))
    def test_groups_are_apart(self, points, n_groups):
        groups = np.array([f"g{i % n_groups}" for i in range(len(points))])
        table = knn(points, 3, groups=groups)
        row, column = np.nonzero(table.index >= 0)
        assert (groups[row] == groups[table.index[row, column]]).all()
        own = np.flatnonzero(groups == "g0")
        alone = knn(points[own], 3, tie_tolerance=0.0)
        whole = knn(points, 3, groups=groups, tie_tolerance=0.0)
        np.testing.assert_array_equal(whole.distance[own, : alone.k], alone.distance)


class TestTies:
    def test_rounding_to_pixels_does_not_decide(self):
        exact = hex_lattice(20, 20, 137.3)
        turned = exact @ np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
        rounded = np.round(turned)
        np.testing.assert_array_equal(np.sort(knn(rounded, 3).index), np.sort(knn(exact, 3).index))
        assert (np.sort(knn(rounded, 3, tie_tolerance=0).index) != np.sort(knn(exact, 3).index)).any()

    def test_all_of_a_rounded_lattice(self):
        rounded = np.round(hex_lattice(20, 20, 137.3))
        assert set(knn(rounded, 3, ties="all").degree.tolist()) <= {3, 4, 5, 6, 8}
        assert knn(rounded, 3, ties="all").degree[210] == 6

    def test_scattered_points_are_compared_exactly(self):
        points = np.random.default_rng(0).random((500, 2))
        same(knn(points, 3), knn_numpy(points, 3))

    def test_lattice_tolerance(self):
        assert lattice_tolerance(np.array([100.0, 101, 100, 99])) == pytest.approx(5.0)
        assert lattice_tolerance(np.array([100.0, 50, 120, 80])) == 0
        assert lattice_tolerance(np.array([np.inf])) == 0

    def test_radius_is_included(self):
        points = hex_lattice(9, 9)
        assert sorted(knn(points, None, radius=100.0).index[40]) == sorted(knn(points, 6).index[40])

    def test_isolated(self):
        table = knn(np.array([[0.0, 0], [1, 0], [50, 0]]), 2, radius=5.0)
        assert table.index.tolist() == [[1, -1], [0, -1], [-1, -1]]
        assert np.isinf(table.distance[2]).all()
        assert table.degree.tolist() == [1, 1, 0]


class TestSmall:
    def test_fewer_than_k(self):
        table = knn(np.array([[0.0, 0], [3, 4]]), 3)
        assert table.index.tolist() == [[1, -1, -1], [0, -1, -1]]
        assert table.distance[0, 0] == 5

    def test_one_and_none(self):
        assert knn(np.zeros((1, 2)), 3).index.tolist() == [[-1, -1, -1]]
        assert knn(np.zeros((1, 2)), 3, include_self=True).index.tolist() == [[0, -1, -1, -1]]
        assert knn(np.zeros((0, 2)), 3).index.shape == (0, 3)
        assert knn(np.zeros((0, 2)), 3).mean_degree == 0


class TestTable:
    @quick
    @given(points=point_sets(), ties=st.sampled_from(["index", "all"]), radius=st.sampled_from([None, 12.0]))
    def test_matrices_and_back(self, points, ties, radius):
        table = knn(points, 3, ties=ties, radius=radius)
        connectivities, distances = table.to_csr()
        assert connectivities.dtype == distances.dtype == np.float32
        assert connectivities.nnz == distances.nnz == (table.index >= 0).sum()
        back = NicheTable.from_csr(connectivities, distances)
        k = back.k
        same(back, NicheTable(table.index[:, :k], table.distance[:, :k]))
        assert (table.index[:, k:] == -1).all()

    def test_matrices_share_no_memory(self):
        connectivities, distances = knn(np.random.default_rng(0).random((50, 2)), 3).to_csr()
        assert not np.shares_memory(connectivities.indices, distances.indices)
        assert not np.shares_memory(connectivities.indptr, distances.indptr)

    def test_back_after_scipy_sorted_and_dropped_zeros(self):
        table = knn(np.array([[0.0, 0], [0, 0], [5, 0], [1, 0], [1, 0]]), 3)
        connectivities, distances = table.to_csr()
        connectivities.sort_indices()
        distances.eliminate_zeros()
        same(NicheTable.from_csr(connectivities, distances), table)

    def test_back_after_spots_were_taken_out(self):
        table = knn(np.array([[0.0, 0], [1, 0], [2.5, 0], [9, 0]]), 2)
        keep = [0, 2, 3]
        connectivities, distances = (m[keep][:, keep] for m in table.to_csr())
        back = NicheTable.from_csr(connectivities, distances)
        assert back.index.tolist() == [[1], [0], [1]]
        assert back.distance.tolist() == [[2.5], [2.5], [6.5]]

    def test_shapes_must_agree(self):
        with pytest.raises(InputError, match="square and of one shape"):
            NicheTable.from_csr(sp.csr_matrix((3, 3)), sp.csr_matrix((4, 4)))

    def test_unit(self):
        table = knn(np.array([[0.0, 0], [10, 0]]), 1).scaled(0.5)
        assert table.distance.dtype == np.float32
        assert table.distance.tolist() == [[5.0], [5.0]]


class TestMean:
    @quick
    @given(points=point_sets(), kind=st.sampled_from([np.float32, np.int64]), wide=st.booleans())
    def test_equals_twin(self, points, kind, wide):
        rng = np.random.default_rng(len(points))
        counts = sp.csr_matrix(rng.poisson(0.7, (len(points), 11)).astype(kind))
        if wide:
            counts.indices, counts.indptr = counts.indices.astype(np.int64), counts.indptr.astype(np.int64)
        table = knn(points, 3, radius=30.0)
        rows = rng.integers(0, len(points), 7)
        np.testing.assert_allclose(niche_mean(counts, table), niche_mean_numpy(counts, table), rtol=1e-6)
        np.testing.assert_allclose(niche_mean(counts, table, rows), niche_mean_numpy(counts, table, rows), rtol=1e-6)

    def test_equals_sparse_product(self):
        rng = np.random.default_rng(0)
        table = knn(rng.random((300, 2)), 6)
        counts = sp.random(300, 40, density=0.2, format="csr", rng=rng, dtype=np.float32)
        product = (table.to_csr()[0] @ counts).toarray() / 6
        np.testing.assert_allclose(niche_mean(counts, table), product, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("k", [1, 3, 6, 7])
    def test_constant_expression_stays(self, k):
        counts = sp.csr_matrix(np.tile(np.array([3.0, 0, 0.1, 7], np.float32), (30, 1)))
        mean = niche_mean(counts, knn(np.random.default_rng(0).random((30, 2)), k))
        np.testing.assert_allclose(mean, counts.toarray(), rtol=2e-7)
        np.testing.assert_array_equal(mean[:, [0, 1, 3]], counts.toarray()[:, [0, 1, 3]])

    def test_empty_niche_is_the_spot(self):
        counts = sp.csr_matrix(np.arange(6, dtype=np.float32).reshape(3, 2))
        table = knn(np.array([[0.0, 0], [1, 0], [50, 0]]), 2, radius=5.0)
        assert niche_mean(counts, table)[2].tolist() == [4, 5]

    def test_buffer_is_used_again(self):
        rng = np.random.default_rng(0)
        counts = sp.csr_matrix(rng.poisson(1, (200, 5)).astype(np.float32))
        table = knn(rng.random((200, 2)), 3)
        buffer = np.full((64, 5), np.nan, np.float32)
        result = niche_mean(counts, table, np.arange(40), out=buffer, transform=np.log1p)
        np.testing.assert_array_equal(result, np.log1p(niche_mean(counts, table)[:40]))
        last = niche_mean(counts, table, np.arange(150, 200), out=buffer)
        assert np.shares_memory(last, buffer)
        np.testing.assert_array_equal(last, niche_mean(counts, table)[150:])

    def test_refusals(self):
        table = knn(np.random.default_rng(0).random((20, 2)), 3)
        counts = sp.csr_matrix(np.ones((20, 4), np.float32))
        with pytest.raises(WrongTypeError, match="must be a CSR matrix, got a csc matrix"):
            niche_mean(counts.tocsc(), table)
        with pytest.raises(WrongTypeError, match="got a ndarray"):
            niche_mean(counts.toarray(), table)
        with pytest.raises(InputError, match="counts have 19 rows and the niche table 20"):
            niche_mean(counts[:19], table)
        with pytest.raises(InputError, match="rows must lie between 0 and 19, got 3 to 20"):
            niche_mean(counts, table, [3, 20])
        for out in (np.empty((20, 4)), np.empty((19, 4), np.float32), np.empty((20, 4), np.float32, order="F")):
            with pytest.raises(InputError, match="out must be C-contiguous float32 of at least"):
                niche_mean(counts, table, out=out)


class TestRefusals:
    @pytest.mark.parametrize(
        ("coords", "message"),
        [
            (np.zeros(3), r"must have the shape \(spots, 2\) or \(spots, 3\), got \(3,\)"),
            (np.zeros((3, 4)), r"got \(3, 4\)"),
            (np.array([[0.0, 1], [np.nan, 2]]), "1 rows that are nan or infinite .the first is row 1"),
            (np.array([[0.0, np.inf], [-np.inf, 2]]), "2 rows that are nan or infinite"),
        ],
    )
    def test_coordinates(self, coords, message):
        with pytest.raises(InputError, match=message):
            knn(coords, 3)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"n_neighbors": 0}, InputError, "n_neighbors must be at least 1"),
            ({"n_neighbors": 2.5}, WrongTypeError, "n_neighbors must be an integer"),
            ({"n_neighbors": None}, InputError, "pass radius="),
            ({"radius": -1.0}, InputError, "radius must be a finite number greater than 0"),
            ({"ties": "indx"}, InputError, "Did you mean 'index'"),
            ({"tie_tolerance": -1.0}, InputError, "tie_tolerance must be a distance of at least 0"),
            ({"groups": ["a"]}, InputError, "groups must have one label a point"),
        ],
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            knn(np.zeros((3, 2)), **options)

    def test_tables_that_do_not_fit(self, monkeypatch):
        monkeypatch.setattr("stfm.slide._niche_table._MAX_ENTRIES", 1000)
        with pytest.raises(InputError, match="does not fit in memory. Take a smaller radius="):
            knn(np.random.default_rng(0).random((100, 2)), None, radius=2.0)


class TestThreads:
    def test_every_row_once(self):
        seen = np.zeros(1000, int)

        def work(lo, hi):
            seen[lo:hi] += 1

        for threads, parts in ((1, 1), (2, 8), (7, 3), (2000, 1)):
            run(work, len(seen), threads, parts=parts, inline=2)
        assert (seen == 4).all()

    def test_an_error_reaches_the_caller(self):
        def work(lo, hi):
            if lo >= 500:
                raise InputError("piece of a thread")

        with pytest.raises(InputError, match="piece of a thread"):
            run(work, 1000, 2, parts=4, inline=2)
