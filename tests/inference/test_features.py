"""Features of frozen encoders: once a slide, kept by hashes, refused when damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_model import make_model, make_slide

from stfm._errors import InputError, StfmWarning
from stfm._settings import settings
from stfm.inference.features import encoder_fingerprint, feature_key, image_features, use_frozen_features
from stfm.inference.stream import embed_slides
from stfm.models.inputs import SlideInputs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path):
    with settings.override(cache_dir=tmp_path):
        yield


def ready(model, slide):
    return SlideInputs(slide, model.inputs, model.vocabulary)


def files(tmp_path):
    return sorted(p.suffix for p in (tmp_path / "features").iterdir())


def test_computed_once_and_read_from_disk_after(tmp_path):
    model = make_model()
    first = image_features(ready(model, make_slide(n=20)), model.niche, "niche", batch_size=6, device="cpu")
    assert first.shape == (20, 8)
    assert first.dtype == np.float32
    assert model.niche.n_seen == 20
    assert files(tmp_path) == [".json", ".npy"]
    again = image_features(ready(model, make_slide(n=20)), model.niche, "niche", device="cpu")
    assert model.niche.n_seen == 20
    np.testing.assert_array_equal(first, again)


def test_without_cache_nothing_is_written(tmp_path):
    model = make_model()
    image_features(ready(model, make_slide(n=5)), model.niche, "niche", device="cpu", cache=False)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path):
    model = make_model()
    (tmp_path / "file").write_text("in the way")
    with settings.override(cache_dir=tmp_path / "file"), pytest.warns(StfmWarning, match="Features are not kept"):
        found = image_features(ready(model, make_slide(n=5)), model.niche, "niche", device="cpu")
    expected = image_features(ready(model, make_slide(n=5)), model.niche, "niche", device="cpu", cache=False)
    np.testing.assert_array_equal(found, expected)


def test_the_key_changes_with_all_that_decides_the_features():
    model = make_model()
    one = ready(model, make_slide(n=20))
    fingerprint = encoder_fingerprint(model.niche)
    key = feature_key(one, fingerprint, "niche")
    assert key == feature_key(ready(make_model(seed=3), make_slide(n=20)), fingerprint, "niche")
    slide = make_slide(n=20)
    other_model = make_model()
    other_model.niche.conv.weight.data += 1
    others = [
        feature_key(one, fingerprint, "spot"),
        feature_key(one, fingerprint, "niche", "bf16"),
        feature_key(one, encoder_fingerprint(other_model.niche), "niche"),
        feature_key(ready(model, make_slide(n=20, seed=1)), fingerprint, "niche"),
        feature_key(ready(model, replace(slide, coords=slide.coords + 1)), fingerprint, "niche"),
        feature_key(ready(model, replace(slide, niche_um=100.0)), fingerprint, "niche"),
        feature_key(ready(model, replace(slide, mpp=0.25)), fingerprint, "niche"),
        feature_key(ready(make_model(niche_px=10), slide), fingerprint, "niche"),
    ]
    assert len({key, *others}) == len(others) + 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "json"])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    model = make_model()
    first = np.array(image_features(ready(model, make_slide(n=20)), model.niche, "niche", device="cpu"))
    path = next((tmp_path / "features").glob("*.npy"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 0xFF
    elif damage == "cut":
        content = content[:-40]
    elif damage == "empty":
        content = bytearray()
    path.write_bytes(content)
    if damage == "json":
        path.with_suffix(".json").write_text("{")
    with pytest.warns(StfmWarning, match="is damaged"):
        again = image_features(ready(model, make_slide(n=20)), model.niche, "niche", device="cpu")
    np.testing.assert_array_equal(first, again)
    assert model.niche.n_seen == 40
    image_features(ready(model, make_slide(n=20)), model.niche, "niche", device="cpu")
    assert model.niche.n_seen == 40


def test_an_error_leaves_no_half_file(tmp_path):
    class Broken(torch.nn.Module):
        n_left = 2

        def forward(self, tiles):
            self.n_left -= 1
            if self.n_left < 0:
                raise ZeroDivisionError
            return torch.zeros(len(tiles), 3)

    model = make_model()
    with pytest.raises(ZeroDivisionError):
        image_features(ready(model, make_slide(n=20)), Broken(), "niche", batch_size=4, device="cpu")
    assert list((tmp_path / "features").iterdir()) == []


def test_features_stand_in_for_tiles():
    model = make_model()
    plain, fast = ready(model, make_slide(n=20)), ready(model, make_slide(n=20))
    use_frozen_features(model, [fast], device="cpu")
    batch = fast.batch(np.arange(4))
    assert batch.niche_tiles is None
    assert batch.niche_features.shape == (4, 8)
    assert batch.spot_tiles is not None
    one, two = (embed_slides(model, [i], device="cpu")[0] for i in (plain, fast))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_slides_without_image_are_left_alone(tmp_path):
    model = make_model()
    one = ready(model, make_slide(n=5).without("image"))
    use_frozen_features(model, [one], device="cpu")
    assert one.niche_features is None
    with pytest.raises(InputError, match="no niche tiles"):
        feature_key(one, "x", "niche")
