"""Slides with H&E, with counts, and with both in one training."""

from __future__ import annotations

from dataclasses import replace

import pytest

import stfm as sf
from stfm.errors import InputError
from stfm.slide import as_slides
from stfm.training.recipes import RECIPES

BY_SLIDE = RECIPES["storm-small"].replace(batches="slide", epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def slides():
    first, second, third = as_slides(sf.datasets.toy(n_spots=80, n_patients=3))
    return [first, replace(second, tiles=None), replace(third, counts=None, panel=None)]


def test_batches_of_one_slide_take_what_each_has(slides):
    model = sf.tl.train(slides, "storm-tiny", recipe=BY_SLIDE, validation=None)
    history = model.history.set_index("stage")
    assert list(history.index) == ["mask", "align"]
    assert model.seen.slides == [slide.name for slide in slides]
    # Alignment learns from the one slide that has both.
    assert history.loc["align", "step"] < history.loc["mask", "step"]


def test_mixed_batches_refuse_them_and_say_what_helps(slides):
    with pytest.raises(InputError, match=r"same modalities, or with batches of one slide each .*batches='slide'"):
        sf.tl.train(slides[:2], "storm-tiny", epochs=1, validation=None)


def test_a_trained_model_goes_on_with_what_a_slide_has():
    adata = sf.datasets.toy(n_spots=60, n_patients=1)
    model = sf.tl.train(adata, "storm-tiny", epochs=1, validation=None)
    counts = [replace(slide, tiles=None) for slide in as_slides(adata)]
    with pytest.warns(sf.errors.StfmWarning, match="no H&E, so the model goes on with stage='mask' alone"):
        further = sf.tl.train(counts, init=model, epochs=1, validation=None)
    assert further.history["stage"].tolist() == ["mask", "align", "mask"]
    with pytest.raises(InputError, match="alignment needs both modalities"):
        sf.tl.train(counts, init=model, stage="both", epochs=1, validation=None)
