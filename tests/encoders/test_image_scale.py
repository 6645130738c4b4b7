"""Tiles at another µm/px than the encoder's are resampled or refused, never fed silently."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stfm as sf
from stfm._errors import InputError
from stfm.encoders import EncoderSpec, build_encoder
from stfm.encoders.scale import fit_scale
from stfm.inference.features import image_features
from stfm.models.inputs import InputSpec, SlideInputs
from stfm.slide.genes import Vocabulary

SPEC = EncoderSpec("mine", "image", "x:y", 3, input_px=32, mpp=0.5)


class MeanOfTiles(torch.nn.Module):
    """Mean colour; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return x.mean(dim=(2, 3))


def encoder_at(mpp: float | None = 0.5, **options):
    function = MeanOfTiles()
    return build_encoder(function, options={"input_px": 32, "mpp": mpp, **options}), function.shapes


def checkerboard(px: int, period: int) -> torch.Tensor:
    place = torch.arange(px) // period % 2
    return (place[:, None] ^ place[None, :]).float().expand(1, 3, px, px).contiguous()


@pytest.mark.parametrize("mpp", [0.5, 0.41, 0.62, None])
def test_the_same_scale_is_only_resized(mpp: float | None):
    x, n = fit_scale(torch.rand(2, 3, 32, 32), SPEC, mpp)
    assert (n, tuple(x.shape)) == (1, (2, 3, 32, 32))
    x, n = fit_scale(torch.rand(2, 3, 64, 64), SPEC, None if mpp is None else mpp / 2)
    assert (n, tuple(x.shape)) == (1, (2, 3, 32, 32))


def test_a_wider_tile_is_covered_with_views_at_the_encoders_scale():
    tile = checkerboard(96, 8)  # 96 px at 0.5 µm/px: squares of 4 µm
    x, n = fit_scale(tile, SPEC, 0.5)
    assert (n, tuple(x.shape)) == (9, (9, 3, 32, 32))
    torch.testing.assert_close(x[0], tile[0, :, :32, :32])
    torch.testing.assert_close(x[8], tile[0, :, 64:, 64:])
    half = torch.nn.functional.interpolate(tile, size=48, mode="area")  # the same tile read at 1 µm/px
    y, n = fit_scale(half, SPEC, 1.0)
    assert n == 9
    assert float((y - x).abs().mean()) < 0.15  # squares have the size in px that they have at 0.5 µm/px
    wrong, _ = fit_scale(half, SPEC, 1.0, on_mpp="ignore")
    assert wrong.shape == (1, 3, 32, 32)


def test_a_narrower_tile_lies_in_white():
    x, n = fit_scale(torch.zeros(1, 3, 32, 32), SPEC, 0.25)  # 8 µm wide: 16 px at 0.5
    assert n == 1
    assert float(x[0, :, 8:24, 8:24].max()) == 0.0
    assert float(x[0, 0].sum()) == 32 * 32 - 16 * 16


@given(px=st.integers(8, 200), mpp=st.floats(0.05, 2.0))
def test_whatever_comes_fits_the_encoder(px: int, mpp: float):
    try:
        x, n = fit_scale(torch.zeros(1, 3, px, px), SPEC, mpp)
    except InputError as error:
        assert "views" in str(error)  # noqa: PT017
        assert px * mpp / SPEC.mpp > 8 * 32
        return
    assert x.shape == (n, 3, 32, 32)
    side = round(px * mpp / 0.5)
    seen = px * mpp / 32
    assert n == (1 if 0.4 <= seen <= 0.625 else max(1, -(-side // 32)) ** 2)


def test_error_ignore_and_too_many_views():
    tile = torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        InputError, match=r"trained at 0.5 µm/px and would see these tiles at 1 µm/px. Ask for tiles of 16"
    ):
        fit_scale(tile, SPEC, 1.0, on_mpp="error")
    assert fit_scale(tile, SPEC, 0.55, on_mpp="error")[1] == 1
    with pytest.raises(InputError, match="would take 144 views of 32 px"):
        fit_scale(tile, SPEC, 6.0)
    with pytest.raises(InputError, match="on_mpp='warn' is unknown"):
        fit_scale(tile, SPEC, 1.0, on_mpp="warn")
    with pytest.raises(InputError, match="on_mpp='warn' is unknown"):
        build_encoder("uni", options={"width": 32, "depth": 1, "heads": 4}, on_mpp="warn")


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_is_a_positive_number(mpp: float):
    with pytest.raises(InputError, match="mpp must be a positive number of µm/px"):
        fit_scale(torch.zeros(1, 3, 32, 32), SPEC, mpp)
    with pytest.raises(InputError, match="mpp must be a number, or one for each of 3 tiles; got 2"):
        encoder_at()[0](torch.zeros(3, 3, 32, 32), torch.tensor([0.5, 1.0]))


def test_an_encoder_of_any_size_reads_the_resampled_tile():
    x, n = fit_scale(torch.rand(1, 3, 40, 40), replace(SPEC, input_px=None), 1.0)
    assert (n, tuple(x.shape)) == (1, (1, 3, 80, 80))


def test_features_are_the_mean_over_views():
    encoder, shapes = encoder_at()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x, 0.5), x.mean(dim=(2, 3)))
    assert shapes[-4:] == [(2, 3, 32, 32)] * 4  # view by view
    n = len(shapes)
    encoder.set_on_mpp("ignore")(x, 0.5)
    assert shapes[n:] == [(2, 3, 32, 32)]
    assert encoder.fingerprint() != encoder.set_on_mpp("resample").fingerprint()


def test_each_tile_may_have_its_own_scale():
    encoder, shapes = encoder_at()
    x = torch.rand(4, 3, 64, 64)
    out = encoder(x, torch.tensor([0.5, 0.25, 0.5, 0.25]))
    torch.testing.assert_close(out, torch.cat([encoder(x[i : i + 1], m) for i, m in enumerate((0.5, 0.25) * 2)]))
    assert len(shapes) == 1 + 4 + 1 + 2 * (4 + 1)  # a probe, both kinds, then tile by tile


@pytest.mark.parametrize("on_mpp", ["resample", "ignore", "error"])
def test_the_scale_of_a_slide_reaches_the_encoder(on_mpp: str):
    (slide,) = sf.slide.as_slides(sf.datasets.toy())
    slide = slide.subset(np.arange(6))
    inputs = SlideInputs(
        slide, InputSpec(spot_px=32, spot_um=64.0, niche_px=None, counts=False, niche_counts=False), None
    )
    assert inputs.tile_mpp("spot") == (2.0,)
    encoder, shapes = encoder_at()
    encoder.set_on_mpp(on_mpp)
    batch = inputs.spots(np.arange(6))
    torch.testing.assert_close(batch.spot_mpp, torch.full((6,), 2.0))
    if on_mpp == "error":
        with pytest.raises(InputError, match="would see these tiles at 2 µm/px"):
            image_features(inputs, encoder, "spot", cache=False)
        return
    n = len(shapes)
    features = image_features(inputs, encoder, "spot", cache=False, batch_size=6)
    assert len(shapes) - n == (16 if on_mpp == "resample" else 1)
    torch.testing.assert_close(torch.from_numpy(features), encoder(batch.spot_tiles, batch.spot_mpp))


def test_contexts_have_their_own_scales():
    (slide,) = sf.slide.as_slides(sf.datasets.toy())
    spec = InputSpec(spot_px=32, contexts_um=(16.0, 64.0), niche_px=None, counts=False, niche_counts=False)
    inputs = SlideInputs(slide, spec, None)
    assert inputs.tile_mpp("spot") == (0.5, 2.0)
    assert inputs.spots(np.arange(3)).spot_mpp.tolist() == [[0.5, 2.0]] * 3


def test_models_pass_the_scale_on():
    (slide,) = sf.slide.as_slides(sf.datasets.toy())
    genes = Vocabulary(slide.panel.names)
    model = sf.models.create(
        "st-align-tiny", genes, spot_image={"name": "uni", "on_mpp": "error",
                                            "options": {"width": 16, "depth": 1, "heads": 2, "patch": 56}},
        pretrained=False,
    )  # fmt: skip
    batch = SlideInputs(slide, model.inputs, genes).batch(np.arange(4))
    with pytest.raises(InputError, match="Encoder 'uni' was trained at 0.5 µm/px and would see these tiles at"):
        model.embed(batch)
