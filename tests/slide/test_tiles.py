"""Tiles: what is cut is what lies there, at the size asked for, from memory or from disk."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stfm.errors import InputError
from stfm.slide import _tile_gather as kernels
from stfm.slide.readers import keep_array
from stfm.slide.readers import zarr as zarr_reader
from stfm.slide.tiles import ImageSource, TileReader, open_image

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (150, 130, 3), dtype=np.uint8)
CENTERS = RNG.uniform(-30, 170, (60, 2))
ALL = np.arange(len(CENTERS))


@pytest.fixture
def blocks_of_32(monkeypatch):
    """Pyramids with small blocks and levels."""
    monkeypatch.setattr(zarr_reader, "BLOCK_PX", 32)
    monkeypatch.setattr(zarr_reader, "_COARSEST_PX", 20)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the rounding of a value that lies between two levels."""
    difference = np.abs(a.astype(int) - b)
    return difference.max() <= 1 and (difference > 0).mean() < 1e-3


@settings(max_examples=40, deadline=None)
@given(x=st.floats(-60, 190), y=st.floats(-60, 210), size=st.integers(1, 64))
def test_same_size_is_a_copy(x, y, size):
    tile = TileReader(open_image(IMAGE), [[x, y]], 0.5).read([0], size_um=size * 0.5, size_px=size)[0]
    x0, y0 = int(np.floor(x - size / 2 + 0.5)), int(np.floor(y - size / 2 + 0.5))
    padded = np.pad(IMAGE, ((400, 400), (400, 400), (0, 0)), constant_values=255)
    np.testing.assert_array_equal(tile, padded[y0 + 400 : y0 + 400 + size, x0 + 400 : x0 + 400 + size])


@settings(max_examples=25, deadline=None)
@given(
    x=st.floats(-60, 190),
    y=st.floats(-60, 210),
    side=st.floats(1.0, 120.0),
    size=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_resampling_equals_the_numpy_twins(x, y, side, size, seed):
    if abs(side - size) < 0.01:
        side = size + 0.5
    tile = TileReader(open_image(IMAGE), [[x, y]], 1.0).read([0], size_um=side, size_px=size)
    twin = kernels.shrink_numpy if side > size else kernels.enlarge_numpy
    expected = twin(IMAGE, np.array([y - side / 2]), np.array([x - side / 2]), side, size)
    assert np.abs(tile.astype(int) - expected).max() <= 1


def test_gather_equals_its_twin():
    corner = np.floor(CENTERS - 14 + 0.5).astype(np.int64)
    tiles = TileReader(open_image(IMAGE), CENTERS, 1.0).read(ALL, size_um=28, size_px=28)
    np.testing.assert_array_equal(tiles, kernels.gather_numpy(IMAGE, corner[:, 1], corner[:, 0], 28))


def test_shrinking_by_whole_factors_is_the_block_mean():
    reader = TileReader(open_image(IMAGE), [[64, 64]], 1.0)
    tile = reader.read([0], size_um=64, size_px=16)[0]
    blocks = IMAGE[32:96, 32:96].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(tile, (blocks + 0.5).astype(np.uint8))


def test_shrinking_keeps_the_mean_with_fractional_weights():
    ramp = np.broadcast_to(np.arange(120, dtype=np.uint8)[:, None, None] * 2, (120, 120, 3))
    tile = TileReader(open_image(ramp), [[60.3, 60.7]], 1.0).read([0], size_um=70.5, size_px=10)[0]
    expected = 2 * (60.7 - 35.25 + (np.arange(10) + 0.5) * 7.05 - 0.5)
    np.testing.assert_allclose(tile[:, 0, 0], expected, atol=0.6)


def test_a_flat_image_stays_flat_and_white_lies_outside():
    flat = np.full((50, 50, 3), 77, np.uint8)
    reader = TileReader(open_image(flat), [[25, 25], [-200, 25]], 1.0)
    for um in (10.0, 33.3, 28.0):
        tiles = reader.read([0, 1], size_um=um, size_px=28)
        assert (tiles[0] == 77).all()
        assert (tiles[1] == 255).all()


@pytest.mark.usefixtures("blocks_of_32")
@pytest.mark.parametrize("size_um", [28.0, 50.0, 31.7, 12.0, 3.3])
def test_disk_and_memory_agree(size_um):
    disk = open_image(keep_array(IMAGE))
    assert len(disk.downsamples) > 2
    disk.downsamples = (1.0,)  # the finest level alone: then nothing may differ
    a = TileReader(open_image(IMAGE), CENTERS, 0.5).read(ALL, size_um=size_um, size_px=28)
    b = TileReader(disk, CENTERS, 0.5).read(ALL, size_um=size_um, size_px=28)
    assert close(a, b)


@pytest.mark.usefixtures("blocks_of_32")
def test_pyramid_level_just_finer_is_read(monkeypatch):
    disk = open_image(keep_array(IMAGE))
    levels = []
    decode = disk._decode
    monkeypatch.setattr(disk, "_decode", lambda level, *window: levels.append(level) or decode(level, *window))
    reader = TileReader(disk, [[60, 60]], 1.0)
    for um, level in ((28, 0), (55, 0), (56, 1), (100, 1), (112, 2)):
        levels.clear()
        reader.read([0], size_um=um, size_px=28)
        assert set(levels) <= {level}
    smooth = np.repeat(np.repeat(RNG.integers(0, 256, (10, 9, 3), dtype=np.uint8), 16, 0), 16, 1)
    coarse = TileReader(open_image(keep_array(smooth)), [[72, 80]], 1.0).read([0], size_um=96, size_px=24)
    fine = TileReader(open_image(smooth), [[72, 80]], 1.0).read([0], size_um=96, size_px=24)
    assert close(coarse, fine)


@pytest.mark.usefixtures("blocks_of_32")
def test_each_block_is_decoded_once(monkeypatch):
    disk = open_image(keep_array(IMAGE))
    disk._kept_bytes = 0
    seen = []
    decode = disk._decode
    monkeypatch.setattr(disk, "_decode", lambda *window: seen.append(window) or decode(*window))
    TileReader(disk, CENTERS, 1.0).read(ALL[::-1], size_um=20, size_px=20)
    assert len(seen) == len(set(seen))
    assert seen


@pytest.mark.usefixtures("blocks_of_32")
def test_small_groups_give_the_same(monkeypatch):
    from stfm.slide import tiles

    reader = TileReader(open_image(keep_array(IMAGE)), CENTERS, 1.0)
    whole = [reader.read(ALL, size_um=um, size_px=28) for um in (28, 60)]
    monkeypatch.setattr(tiles, "_PATCH_BYTES", 10_000)
    for um, expected in zip((28, 60), whole, strict=True):
        np.testing.assert_array_equal(reader.read(ALL, size_um=um, size_px=28), expected)


def test_order_repeats_and_masks():
    reader = TileReader(open_image(IMAGE), CENTERS, 1.0)
    tiles = reader.read(ALL, size_um=20, size_px=20)
    np.testing.assert_array_equal(reader.read([5, 3, 3], size_um=20, size_px=20), tiles[[5, 3, 3]])
    np.testing.assert_array_equal(reader.read(ALL % 2 == 0, size_um=20, size_px=20), tiles[::2])
    assert reader.read([], size_um=20, size_px=20).shape == (0, 20, 20, 3)


def test_many_tiles_on_threads_equal_one_by_one():
    reader = TileReader(open_image(IMAGE), np.tile(CENTERS, (10, 1)), 1.0)
    for um in (64, 100, 30):
        tiles = reader.read(np.arange(600), size_um=um, size_px=64)
        for i in (0, 299, 300, 599):
            np.testing.assert_array_equal(reader.read([i], size_um=um, size_px=64)[0], tiles[i])


def test_out_is_filled():
    reader = TileReader(open_image(IMAGE), CENTERS, 1.0)
    out = np.empty((4, 20, 20, 3), np.uint8)
    assert reader.read([1, 2, 3, 4], size_um=20, size_px=20, out=out) is out
    np.testing.assert_array_equal(out, reader.read([1, 2, 3, 4], size_um=20, size_px=20))
    for bad in (np.empty((3, 20, 20, 3), np.uint8), out.astype(np.float32), out[:, ::-1]):
        with pytest.raises(InputError, match="out must be C-contiguous uint8"):
            reader.read([1, 2, 3, 4], size_um=20, size_px=20, out=bad)
    with pytest.raises(InputError, match="float32"):
        reader.read_float([1], size_um=20, size_px=20, out=out)


@pytest.mark.parametrize("size_um", [14.0, 40.0, 3.0])
def test_normalised_tiles(size_um):
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    reader = TileReader(open_image(IMAGE), CENTERS, 0.5)
    tiles = reader.read(ALL, size_um=size_um, size_px=28)
    expected = ((tiles / 255 - mean) / std).transpose(0, 3, 1, 2)
    out = np.empty(expected.shape, np.float32)
    reader.read_float(ALL, size_um=size_um, size_px=28, mean=mean, std=std, out=out)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    plain = reader.read_float(ALL, size_um=size_um, size_px=28)
    np.testing.assert_allclose(plain, tiles.transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_image_scale_maps_full_resolution_to_the_image():
    reader = TileReader(open_image(IMAGE), CENTERS * 10, 0.2, image_scale=0.1)
    assert reader.native_mpp == pytest.approx(2.0)
    same = TileReader(open_image(IMAGE), CENTERS, 2.0)
    np.testing.assert_array_equal(reader.read(ALL, size_um=56, size_px=28), same.read(ALL, size_um=56, size_px=28))


def test_padded_and_outside():
    reader = TileReader(open_image(IMAGE), [[65, 75], [10, 75], [120, 75], [65, 149.5], [-1, 75], [130, 10]], 0.5)
    assert reader.padded(10).tolist() == [False, False, False, True, True, True]
    assert reader.padded(20).tolist() == [False, True, True, True, True, True]
    assert reader.outside().tolist() == [False, False, False, False, True, True]
    whole = TileReader(open_image(IMAGE[:64, :64]), [[32, 32]], 1.0)
    assert not whole.padded(64).any()


def test_subset_and_fingerprint():
    reader = TileReader(open_image(IMAGE), CENTERS, 1.0)
    some = reader.subset([4, 2])
    assert (some.n_obs, reader.n_obs) == (2, len(CENTERS))
    np.testing.assert_array_equal(
        some.read([0, 1], size_um=20, size_px=20), reader.read([4, 2], size_um=20, size_px=20)
    )
    prints = {
        reader.fingerprint(),
        some.fingerprint(),
        TileReader(open_image(IMAGE), CENTERS, 1.1).fingerprint(),
        TileReader(open_image(IMAGE[:, ::-1]), CENTERS, 1.0).fingerprint(),
    }
    assert len(prints) == 4
    assert reader.fingerprint() == TileReader(open_image(IMAGE.copy()), CENTERS, 1.0).fingerprint()


def test_reader_goes_to_other_processes():
    reader = TileReader(open_image(keep_array(IMAGE)), CENTERS, 1.0)
    tiles = reader.read(ALL, size_um=30, size_px=28)
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.read(ALL, size_um=30, size_px=28), tiles)


def test_memory_does_not_grow_with_the_spots():
    source = open_image(keep_array(np.tile(IMAGE, (8, 8, 1))))
    peaks = []
    for n in (2_000, 40_000):
        centers = np.random.default_rng(1).uniform(100, 900, (n, 2))
        reader = TileReader(source, centers, 1.0)
        reader.read(np.arange(64), size_um=224, size_px=224)
        tracemalloc.start()
        for start in range(0, n, n // 8):
            reader.read(np.arange(start, start + 64), size_um=224, size_px=224)
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * n * 8)
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 1e6


def test_sources_are_recognised():
    assert isinstance(open_image(IMAGE), ImageSource)
    assert isinstance(open_image(keep_array(IMAGE)), ImageSource)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size_um": 0.0, "size_px": 28}, "size_um"),
        ({"size_um": np.nan, "size_px": 28}, "size_um"),
        ({"size_um": 10.0, "size_px": 0}, "size_px"),
    ],
)
def test_sizes_are_checked(arguments, message):
    reader = TileReader(open_image(IMAGE), CENTERS, 1.0)
    for read in (reader.read, reader.read_float):
        with pytest.raises(InputError, match=message):
            read([0], **arguments)


@pytest.mark.parametrize("indices", [[-1], [60], [0, 1000]])
def test_indices_are_checked(indices):
    with pytest.raises(InputError, match="numbered 0 to 59"):
        TileReader(open_image(IMAGE), CENTERS, 1.0).read(indices, size_um=10, size_px=10)


@pytest.mark.parametrize("centers", [[[1.0, np.nan]], [1.0, 2.0], [[1.0, 2.0, 3.0]]])
def test_centers_are_checked(centers):
    with pytest.raises(InputError, match="centers_px"):
        TileReader(open_image(IMAGE), centers, 1.0)
    with pytest.raises(InputError, match="mpp"):
        TileReader(open_image(IMAGE), CENTERS, 0.0)
