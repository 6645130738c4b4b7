"""Images from arrays, zarr and files: the same pixels whichever way, and words for what is damaged."""

from __future__ import annotations

import time

import numpy as np
import pytest
import zarr
from PIL import Image

from stfm._settings import settings
from stfm.errors import DataIntegrityError, InputError, WrongTypeError
from stfm.slide.readers import keep_array, open_image, thumbnail
from stfm.slide.readers import zarr as zarr_reader
from stfm.slide.readers.base import halve

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (70, 50, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path):
    with settings.override(cache_dir=tmp_path / "cache"):
        yield


def pixels(source) -> np.ndarray:
    return np.asarray(source.read(0, 0, 0, *source.shape))


@pytest.mark.parametrize(
    "image",
    [
        IMAGE,
        IMAGE.transpose(2, 0, 1),
        np.dstack([IMAGE, np.full((70, 50), 255, np.uint8)]),
        Image.fromarray(IMAGE),
        IMAGE[::-1][::-1],
    ],
    ids=["hwc", "chw", "rgba", "pillow", "strided"],
)
def test_arrays_of_every_kind(image):
    np.testing.assert_array_equal(pixels(open_image(image)), IMAGE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_scaled(dtype):
    np.testing.assert_array_equal(pixels(open_image((IMAGE / 255).astype(dtype))), IMAGE)


def test_grey_and_transparency():
    grey = pixels(open_image(IMAGE[:, :, :1]))
    assert (grey == IMAGE[:, :, :1]).all()
    assert (pixels(open_image(IMAGE[:, :, 0])) == grey).all()
    clear = np.dstack([IMAGE, np.zeros((70, 50), np.uint8)])
    assert (pixels(open_image(clear)) == 255).all()
    assert set(np.unique(pixels(open_image(IMAGE[:, :, 0] > 128)))) == {0, 255}


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((5, 5, 7), np.uint8), InputError, r"expected \(height, width, 3\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), InputError, "expected"),
        (np.zeros((0, 4, 3), np.uint8), InputError, "empty"),
        (np.full((4, 4, 3), 2.0), InputError, r"floats must lie in 0\.\.1"),
        (np.full((4, 4, 3), np.nan), InputError, r"floats must lie in 0\.\.1"),
        (np.zeros((4, 4, 3), np.uint16), WrongTypeError, "uint16"),
        (42, WrongTypeError, "int"),
    ],
)
def test_what_is_no_picture_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        open_image(image)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".jpg"])
@pytest.mark.parametrize("cache", [True, False])
def test_files(tmp_path, suffix, cache):
    path = tmp_path / f"he{suffix}"
    Image.fromarray(IMAGE).save(path)
    expected = np.asarray(Image.open(path))
    source = open_image(path, cache=cache)
    np.testing.assert_array_equal(pixels(source), expected)
    assert source.shape == (70, 50)
    assert (settings.cache_dir / "images").exists() == cache


def test_tiff_without_tifffile(tmp_path, monkeypatch):
    path = tmp_path / "he.tif"
    Image.fromarray(IMAGE).save(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.testing.assert_array_equal(pixels(open_image(str(path))), IMAGE)


def test_ome_tiff_says_its_scale(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "he.ome.tif"
    tifffile.imwrite(path, IMAGE, metadata={"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"})
    source = open_image(path)
    assert source.mpp == 0.25
    assert open_image(path).mpp == 0.25  # also from the kept pyramid
    np.testing.assert_array_equal(pixels(source), IMAGE)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_files_of_other_modes(tmp_path, mode):
    path = tmp_path / ("he.tif" if mode == "CMYK" else "he.png")
    Image.fromarray(IMAGE).convert(mode).save(path)
    source = open_image(path, cache=False)
    assert source.shape == (70, 50)
    if mode != "CMYK":
        np.testing.assert_array_equal(pixels(source), np.asarray(Image.open(path).convert("RGB")))


def test_a_file_is_decoded_once(tmp_path, monkeypatch):
    path = tmp_path / "he.png"
    Image.fromarray(IMAGE).save(path)
    first = open_image(path)
    monkeypatch.setattr("stfm.slide.readers.decode.decoded", None)
    again = open_image(path)
    assert again.fingerprint() == first.fingerprint()
    np.testing.assert_array_equal(pixels(again), IMAGE)
    copied = tmp_path / "another name.png"
    copied.write_bytes(path.read_bytes())
    assert open_image(copied).fingerprint() == first.fingerprint()  # the content counts, not the name


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"he{suffix}"
    Image.fromarray(np.tile(IMAGE, (4, 4, 1))).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for cache in (True, False):
        with pytest.raises(DataIntegrityError, match="damaged|cut short|not an image|not a TIFF"):
            open_image(path, cache=cache)
    assert not list((settings.cache_dir / "images").glob("*"))  # nothing half-written stays


def test_a_text_file_is_no_image(tmp_path):
    path = tmp_path / "he.jpg"
    path.write_text("this is not a picture")
    with pytest.raises(DataIntegrityError, match="not an image"):
        open_image(path)
    with pytest.raises(InputError, match="There is no image"):
        open_image(tmp_path / "none.jpg")
    other = tmp_path / "he.bmp"
    other.write_bytes(b"BM")
    with pytest.raises(InputError, match=r"'\.bmp'.*\.tif"):
        open_image(other)


def test_deep_pixels_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "dapi.tif"
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(path)
    with pytest.raises(WrongTypeError, match="uint16"):
        open_image(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="8-bit"):
        open_image(path)


def test_large_images_open_and_the_limit_of_pillow_stays(tmp_path, monkeypatch):
    path = tmp_path / "he.png"
    Image.fromarray(IMAGE).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    open_image(path, cache=False)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr("stfm.slide.readers.decode._MOST_PX", 100)
    with pytest.raises(InputError, match="billion px"):
        open_image(path, cache=False)


def test_unwritable_cache(tmp_path, monkeypatch):
    path = tmp_path / "he.png"
    Image.fromarray(IMAGE).save(path)
    monkeypatch.setattr(zarr_reader, "writable", lambda folder: False)
    with pytest.raises(InputError, match="STFM_CACHE"):
        open_image(path)


def test_pyramid(monkeypatch):
    monkeypatch.setattr(zarr_reader, "BLOCK_PX", 16)
    monkeypatch.setattr(zarr_reader, "_COARSEST_PX", 10)
    folder = keep_array(IMAGE)
    assert keep_array(IMAGE) == folder
    source = open_image(folder)
    assert source.downsamples == (1.0, 2.0, 4.0, 8.0)[: len(source.downsamples)]
    expected = IMAGE
    for level in range(len(source.downsamples)):
        h, w = source.level_shape(level)
        np.testing.assert_array_equal(source.read(level, 0, 0, h, w), expected)
        expected = halve(expected)
    np.testing.assert_array_equal(source.read(0, 3, 5, 20, 30), IMAGE[3:23, 5:35])
    assert source.array(0) is None


@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (1, 1), (1025, 3)])
def test_halving_averages_blocks(shape):
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    padded = np.pad(image, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge").astype(int)
    total = padded[0::2, 0::2] + padded[1::2, 0::2] + padded[0::2, 1::2] + padded[1::2, 1::2]
    np.testing.assert_array_equal(halve(image), (total + 2) // 4)


def test_foreign_zarr(tmp_path):
    hwc = zarr.create_array(str(tmp_path / "a.zarr"), data=IMAGE, chunks=(32, 32, 3))
    zarr.create_array(str(tmp_path / "b.zarr"), data=IMAGE.transpose(2, 0, 1).copy(), chunks=(3, 32, 32))
    for image in (tmp_path / "a.zarr", str(tmp_path / "b.zarr"), hwc):
        source = open_image(image)
        assert source.shape == (70, 50)
        np.testing.assert_array_equal(pixels(source), IMAGE)
        assert source.fingerprint() == open_image(image).fingerprint()
    assert open_image(tmp_path / "a.zarr").block_shape(0) == open_image(tmp_path / "b.zarr").block_shape(0) == (32, 32)


def test_ome_zarr(tmp_path):
    group = zarr.open_group(str(tmp_path / "ome.zarr"), mode="w")
    for i, image in enumerate([IMAGE, halve(IMAGE)]):
        group.create_array(f"s{i}", data=image.transpose(2, 0, 1)[None, :, None].copy())
    axes = [{"name": n} for n in "tcz"] + [{"name": n, "unit": "micrometer"} for n in "yx"]
    scales = [[1, 1, 1, 0.5 * 2**i, 0.5 * 2**i] for i in range(2)]
    group.attrs["multiscales"] = [
        {
            "axes": axes,
            "datasets": [
                {"path": f"s{i}", "coordinateTransformations": [{"type": "scale", "scale": scales[i]}]}
                for i in range(2)
            ],
        }
    ]
    with pytest.raises(InputError, match="expected"):  # c is not beside y and x
        open_image(tmp_path / "ome.zarr")
    group = zarr.open_group(str(tmp_path / "cyx.zarr"), mode="w")
    for i, image in enumerate([IMAGE, halve(IMAGE)]):
        group.create_array(f"s{i}", data=image.transpose(2, 0, 1).copy())
    datasets = [
        {"path": f"s{i}", "coordinateTransformations": [{"type": "scale", "scale": s[2:]}]}
        for i, s in enumerate(scales)
    ]
    group.attrs["ome"] = {"multiscales": [{"axes": axes[1:2] + axes[3:], "datasets": datasets}]}
    source = open_image(tmp_path / "cyx.zarr")
    assert source.mpp == 0.5
    assert source.downsamples == (1.0, 2.0)
    np.testing.assert_array_equal(source.read(1, 0, 0, 35, 25), halve(IMAGE))


def test_bad_zarr(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataIntegrityError, match="cannot be opened as zarr"):
        open_image(tmp_path / "empty")
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    with pytest.raises(DataIntegrityError, match="has no image"):
        open_image(tmp_path / "group.zarr")
    zarr.create_array(str(tmp_path / "float.zarr"), data=IMAGE / 255)
    with pytest.raises(WrongTypeError, match="float64"):
        open_image(tmp_path / "float.zarr")
    zarr.create_array(str(tmp_path / "flat.zarr"), data=IMAGE[:, :, 0].copy())
    with pytest.raises(InputError, match="expected"):
        open_image(tmp_path / "flat.zarr")
    zarr.create_array(str(tmp_path / "rgba.zarr"), data=np.dstack([IMAGE, IMAGE[:, :, :1]]))
    with pytest.raises(InputError, match="three channels"):
        open_image(tmp_path / "rgba.zarr")


def test_damaged_block():
    folder = keep_array(IMAGE)
    chunk = next(p for p in (folder / "0").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(DataIntegrityError, match="cannot be decoded"):
        pixels(open_image(folder))


def test_blocks_are_kept_up_to_a_size(monkeypatch):
    monkeypatch.setattr(zarr_reader, "BLOCK_PX", 16)
    source = zarr_reader.ZarrSource(keep_array(IMAGE), kept_bytes=3 * 16 * 16 * 3)
    for y in (0, 16, 32, 48):
        source.read(0, y, 0, 16, 16)
    assert len(source._kept) == 3
    assert (0, 0, 0) not in source._kept


def test_thumbnail():
    large = np.zeros((1200, 700, 3), np.uint8)
    large[:600] = 200
    for source in (open_image(large), open_image(keep_array(large))):
        picture, factor = thumbnail(source, 100)
        assert 50 < max(picture.shape) <= 101
        np.testing.assert_allclose(np.array(picture.shape[:2]) / factor, (1200, 700), rtol=0.05)
        assert (picture[: len(picture) // 2 - 1] == 200).all()
        assert (picture[len(picture) // 2 + 1 :] == 0).all()


def test_a_pyramid_that_is_there_stays():
    folder = keep_array(IMAGE)
    zarr_reader.write_pyramid(folder, [IMAGE[::-1]], (70, 50), fingerprint="of a slower process")
    np.testing.assert_array_equal(pixels(open_image(folder)), IMAGE)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.slow
def test_her2st_jpeg_is_decoded_once(shared_data):
    path = shared_data / "cache" / "her2st" / "data" / "ST-imgs" / "C" / "C2" / "5714_HE_BT_C2.jpg"
    first = open_image(path)
    start = time.perf_counter()
    again = open_image(path)
    assert time.perf_counter() - start < 2.0
    assert again.shape == first.shape == (9911, 9274)
    assert again.downsamples == (1.0, 2.0, 4.0, 8.0, 16.0)
    monochrome = again.read(0, 4000, 4000, 100, 100)
    assert monochrome.shape == (100, 100, 3)
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    with Image.open(path) as image:
        expected = np.asarray(image.crop((4000, 4000, 4100, 4100)))
    Image.MAX_IMAGE_PIXELS = limit
    np.testing.assert_array_equal(monochrome, expected)


def test_tiff_of_a_visium_brain(shared_data):
    path = shared_data / "bundles" / "spacemake_mouse_brain_tif" / "visium" / "V1_Adult_Mouse_Brain_image_small.tif"
    source = open_image(path, cache=False)
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels(source), np.asarray(image.convert("RGB")))
