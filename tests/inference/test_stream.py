"""Embeddings in a stream: any batch size, any order, flat memory, either modality alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import make_model, make_slide

from stfm._errors import InputError
from stfm.inference.device import evaluating, resolve_device
from stfm.inference.stream import PARTS, embed_blocks, embed_slides, reading_order
from stfm.models.inputs import SlideInputs


def ready(model, *slides):
    return [SlideInputs(s, model.inputs, model.vocabulary, slide_id=i) for i, s in enumerate(slides)]


def two_slides():
    return make_slide("A", 37, seed=1), make_slide("B", 12, seed=2)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_same_for_any_batch_size(batch_size):
    model = make_model()
    whole = embed_slides(model, ready(model, *two_slides()), batch_size=16, device="cpu")
    other = embed_slides(model, ready(model, *two_slides()), batch_size=batch_size, device="cpu")
    for one, two in zip(whole, other, strict=True):
        assert one.keys() == two.keys() == set(PARTS)
        for name in one:
            assert one[name].dtype == np.float32
            np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_spots_come_back_in_their_order():
    model = make_model()
    slide = make_slide("A", 37, seed=1)
    shuffled = np.random.default_rng(0).permutation(37)
    plain = embed_slides(model, ready(model, slide), device="cpu")[0]["joint"]
    moved = embed_slides(model, ready(model, slide.subset(shuffled)), batch_size=5, device="cpu")[0]["joint"]
    np.testing.assert_allclose(moved, plain[shuffled], atol=1e-5)


def test_equals_the_model_called_directly():
    model = make_model()
    inputs = ready(model, make_slide("A", 10))
    result = embed_slides(model, inputs, device="cpu")[0]
    with torch.no_grad():
        direct = model.eval().embed(inputs[0].batch(np.arange(10)))
    for name in PARTS:
        np.testing.assert_allclose(result[name], getattr(direct, name).numpy(), atol=1e-5)


def test_no_more_than_a_few_batches_are_read_at_once():
    model = make_model()
    inputs = ready(model, make_slide("A", 400))
    reader = inputs[0].slide.tiles
    blocks = embed_blocks(model, inputs, batch_size=10, device="cpu")
    for number, block in enumerate(blocks):
        assert len(block.indices) <= 10
        # spot and niche tile of the blocks so far, and of at most three that are under way
        assert reader.n_read <= 2 * 10 * (number + 4)
    assert reader.n_read == 800


@pytest.mark.parametrize(("gone", "left"), [("image", {"joint", "gene"}), ("gene", {"joint", "image", "niche"})])
def test_a_missing_modality_leaves_its_part_out(gone, left):
    model = make_model()
    parts = embed_slides(model, ready(model, make_slide("A", 9).without(gone)), device="cpu")[0]
    assert parts.keys() == left
    assert np.isfinite(parts["joint"]).all()


def test_one_spot():
    model = make_model()
    parts = embed_slides(model, ready(model, make_slide("A", 1)), device="cpu")[0]
    assert parts["joint"].shape == (1, 8)


def test_the_model_is_put_back_as_it_was():
    model = make_model().train()
    model.niche.eval()
    embed_slides(model, ready(model, make_slide("A", 5)), device="cpu")
    assert model.training
    assert model.image[1].training
    assert not model.niche.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_model_is_put_back_after_an_error():
    model = make_model().train()
    with pytest.raises(ZeroDivisionError), evaluating(model, torch.device("cpu")) as running:
        _ = running.training / 0
    assert model.training


def test_reading_order_passes_in_strips():
    model = make_model()
    slide = make_slide("A", 900)  # 30 x 30 spots at 100 µm: three strips of 1 mm
    order = reading_order(ready(model, slide)[0])
    assert sorted(order) == list(range(900))
    assert np.all(np.diff(np.floor(slide.coords[order, 1] / 1000.0)) >= 0)
    no_image = ready(model, slide.without("image"))[0]
    assert reading_order(no_image).tolist() == list(range(900))


def test_bf16_is_close():
    model = make_model()
    inputs = ready(model, make_slide("A", 20))
    full = embed_slides(model, inputs, device="cpu")[0]["joint"]
    half = embed_slides(model, inputs, device="cpu", precision="bf16")[0]["joint"]
    np.testing.assert_allclose(half, full, atol=0.05)


def test_guards():
    model = make_model()
    inputs = ready(model, make_slide("A", 5))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        next(embed_blocks(model, inputs, batch_size=0))
    with pytest.raises(InputError, match="precision='fp8'"):
        embed_slides(model, inputs, device="cpu", precision="fp8")
    with pytest.raises(InputError, match="device='tpu' is unknown"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is about machines without CUDA")
def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="device='cuda' is not there; this machine has: cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type in {"cpu", "mps"}


@pytest.mark.gpu
def test_gpu_equals_cpu():
    model = make_model()
    inputs = ready(model, *two_slides())
    cpu = embed_slides(model, inputs, device="cpu")
    gpu = embed_slides(model, inputs, device="auto")
    for one, two in zip(cpu, gpu, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4)
