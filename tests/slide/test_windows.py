"""Windows of neighbours: 5 x 5 on lattices however they lie, the nearest elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stfm._errors import InputError
from stfm.slide.windows import window_table

HEX_ROW = math.sqrt(3) / 2


def lattice(kind: str, rows: int = 11, columns: int = 12, pitch: float = 100.0):
    """Return coordinates and the (row, column) of each spot."""
    row, column = (a.ravel() for a in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    if kind == "square":
        xy = np.column_stack([column, row]).astype(float)
    else:
        xy = np.column_stack([column + 0.5 * (row % 2), HEX_ROW * row])
    return pitch * xy, np.column_stack([row, column])


def turned(xy: np.ndarray, degrees: float, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return xy @ np.array([[c, s], [-s, c]]) + np.asarray(shift)


def members(table: np.ndarray, spot: int) -> set[int]:
    return {int(i) for i in table[spot] if i >= 0}


def inner(cells: np.ndarray, margin: int = 3) -> np.ndarray:
    top = cells.max(axis=0)
    return np.flatnonzero(((cells >= margin) & (cells <= top - margin)).all(axis=1))


@pytest.mark.parametrize("kind", ["square", "hex"])
@pytest.mark.parametrize(("size", "half"), [(9, 1), (25, 2), (49, 3)])
def test_windows_of_a_lattice_are_square(kind: str, size: int, half: int):
    xy, cells = lattice(kind)
    table = window_table(xy, size)
    assert table.dtype == np.int32
    assert table.shape == (len(xy), size)
    for spot in inner(cells, half + 1):
        found = members(table, spot)
        assert len(found) == size
        rows, n = np.unique(cells[list(found), 0] - cells[spot, 0], return_counts=True)
        assert rows.tolist() == list(range(-half, half + 1))
        assert set(n.tolist()) == {2 * half + 1}


def test_square_window_is_that_of_rows_and_columns():
    xy, cells = lattice("square")
    table = window_table(xy, 25)
    for spot in range(len(xy)):
        near = (abs(cells - cells[spot]) <= 2).all(axis=1)
        assert members(table, spot) == set(np.flatnonzero(near))


def test_hexagonal_rows_hold_the_nearest_places():
    xy, cells = lattice("hex")
    table = window_table(xy, 25)
    spot = int(np.flatnonzero((cells == [4, 5]).all(axis=1))[0])
    offset = (xy[list(members(table, spot))] - xy[spot]) / 100.0
    even = np.sort(offset[np.isclose(offset[:, 1], 0), 0])
    odd = np.sort(offset[np.isclose(offset[:, 1], HEX_ROW), 0])
    np.testing.assert_allclose(even, [-2, -1, 0, 1, 2], atol=1e-9)
    np.testing.assert_allclose(odd, [-1.5, -0.5, 0.5, 1.5, 2.5], atol=1e-9)


@pytest.mark.parametrize("kind", ["square", "hex"])
def test_own_spot_first_then_by_distance_then_empty(kind: str):
    xy, _ = lattice(kind)
    table = window_table(xy, 25)
    assert (table[:, 0] == np.arange(len(xy))).all()
    there = table >= 0
    assert (np.diff(there.astype(int), axis=1) <= 0).all()
    distance = np.linalg.norm(xy[np.maximum(table, 0)] - xy[:, None], axis=-1)
    assert (np.where(there[:, 1:], np.diff(distance, axis=1), 0.0) >= -1e-6).all()
    for spot in range(len(xy)):
        assert len(members(table, spot)) == there[spot].sum()  # nobody twice


@pytest.mark.parametrize("kind", ["square", "hex"])
def test_corners_and_holes_stay_empty(kind: str):
    xy, cells = lattice(kind)
    corner = int(np.flatnonzero((cells == 0).all(axis=1))[0])
    assert (window_table(xy, 25)[corner] >= 0).sum() in {9, 10}  # 3 rows of 3; a row to the right has one more
    middle = int(np.flatnonzero((cells == [5, 6]).all(axis=1))[0])
    hole = int(np.flatnonzero((cells == [5, 7]).all(axis=1))[0])
    kept = np.delete(np.arange(len(xy)), hole)
    table = window_table(xy[kept], 25)
    assert (table[np.searchsorted(kept, middle)] >= 0).sum() == 24


@given(
    kind=st.sampled_from(["square", "hex"]), degrees=st.floats(-25, 25), dx=st.floats(-1e4, 1e4),
    scale=st.floats(0.01, 50),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_same_for_a_turned_shifted_and_scaled_lattice(kind: str, degrees: float, dx: float, scale: float):
    xy, _ = lattice(kind)
    table, other = window_table(xy, 25), window_table(scale * turned(xy, degrees, (dx, -dx)), 25)
    for spot in range(len(xy)):
        assert members(other, spot) == members(table, spot)


@given(kind=st.sampled_from(["square", "hex"]), degrees=st.floats(-25, 25), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_jitter_changes_nothing(kind: str, degrees: float, seed: int):
    xy, _ = lattice(kind)
    noise = np.random.default_rng(seed).uniform(-7, 7, xy.shape)
    table, other = window_table(xy, 25), window_table(turned(xy + noise, degrees), 25)
    for spot in range(len(xy)):
        assert members(other, spot) == members(table, spot)


@pytest.mark.parametrize("axes", [2, 3])
def test_scattered_spots_have_the_nearest(axes: int):
    xy = np.random.default_rng(0).uniform(0, 1000, (200, axes))
    table = window_table(xy, 25)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    assert (np.sort(table, axis=1) == np.sort(np.argsort(distance, axis=1)[:, :25], axis=1)).all()
    assert (table[:, 0] == np.arange(200)).all()


def test_sizes_that_are_no_odd_square_take_the_nearest_on_a_lattice_too():
    xy, _ = lattice("square")
    table = window_table(xy, 16)
    assert (table >= 0).all()
    assert window_table(xy, 1).tolist() == [[i] for i in range(len(xy))]


def test_window_larger_than_the_slide():
    xy, _ = lattice("square", 4, 5)
    with pytest.raises(InputError, match=r"a window of 25 .* slide 'A', which has 20\. .* config=\{'window': 9\}"):
        window_table(xy, 25, name="slide 'A'")
    with pytest.raises(InputError, match="window"):
        window_table(xy, 0)
