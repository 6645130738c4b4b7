"""Integrated gradients: analytic fixtures, completeness on models, what cannot matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import GENES, make_model, make_slide

from stfm._errors import InputError, MissingDependencyError

pytest.importorskip("captum", reason="the extra attribution is not installed")

from stfm.inference.attribution import attribute_spots, integrated_gradients, target_of
from stfm.models import create
from stfm.models.inputs import SlideInputs
from stfm.slide.genes import Vocabulary

CONFIG = {
    "contexts_um": (112.0,),
    "spot_px": 16,
    "window": 9,
    "width": 16,
    "heads": 2,
    "gene_width": 4,
    "joint": "concat",
}


def gradients(f, x, **options) -> torch.Tensor:
    x = torch.tensor([x], dtype=torch.float64)
    return integrated_gradients(f, (x,), (torch.zeros_like(x),), **options)[0][0]


class TestAnalytic:
    """FACTS, section 6."""

    @pytest.mark.parametrize("n_steps", [2, 7, 50])
    def test_product_and_square_are_exact_for_any_number_of_steps(self, n_steps: int):
        found = gradients(lambda x: x[:, 0] * x[:, 1] + x[:, 2] ** 2, [2.0, 3.0, -1.0], n_steps=n_steps)
        torch.testing.assert_close(found, torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64))

    @pytest.mark.parametrize(("n_steps", "value"), [(10, 2.1), (50, 1.98), (1000, 2.001)])
    def test_relu_by_the_midpoint_rule(self, n_steps: int, value: float):
        found = gradients(lambda x: torch.relu(x[:, 0] - 1), [3.0], n_steps=n_steps)
        assert float(found) == pytest.approx(value, abs=1e-6)

    def test_linear_is_weight_times_difference(self):
        w = torch.arange(1.0, 5.0, dtype=torch.float64)
        x, x0 = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
        found = integrated_gradients(lambda x: x @ w, (x,), (x0,), n_steps=3)[0]
        torch.testing.assert_close(found, w * (x - x0))

    def test_what_is_not_read_gets_nothing(self):
        assert gradients(lambda x: x[:, 0].exp(), [1.0, 5.0])[1] == 0.0

    def test_several_inputs_and_batches_of_the_way(self):
        x, y = torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]])
        whole, parts = (
            integrated_gradients(
                lambda x, y: x[:, 0] * y.sum(1), (x, y), (x * 0, y * 0), n_steps=20, batch_size=batch_size
            )
            for batch_size in (None, 6)
        )
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b)
        assert float(whole[0].sum() + whole[1].sum()) == pytest.approx(14.0)

    def test_steps_are_counted(self):
        with pytest.raises(InputError, match="n_steps"):
            gradients(lambda x: x[:, 0], [1.0], n_steps=1)


@pytest.fixture(scope="module")
def storm():
    torch.manual_seed(0)
    return create("storm-tiny", Vocabulary(GENES), **CONFIG).eval()


@pytest.fixture(scope="module")
def inputs(storm) -> SlideInputs:
    one = SlideInputs(make_slide(n=36), storm.inputs, storm.vocabulary)
    storm.fit_inputs([one])
    generator = np.random.default_rng(0)
    one.spot_features = generator.normal(size=(36, storm.image.encoder.width)).astype(np.float32)
    return one


def width_of(model, inputs: SlideInputs) -> int:
    """Length of the joint embedding."""
    with torch.no_grad():
        return model.embed(inputs.batch(np.array([0, 1]))).joint.shape[1]


class TestModels:
    @pytest.mark.parametrize("baseline", ["mean", "zero"])
    @pytest.mark.parametrize("gene", [True, False])
    def test_attributions_add_up_ever_better(self, storm, inputs, baseline: str, gene: bool):
        target = target_of(storm, 3) if gene else target_of(storm, np.linspace(-1, 1, width_of(storm, inputs)))
        errors = []
        for n_steps in (4, 16, 256):
            one = attribute_spots(storm, inputs, [14], target, n_steps=n_steps, baseline=baseline, device="cpu")[0]
            errors.append(abs(one.total - (one.output - one.baseline)))
        moved = abs(one.image).sum() + abs(one.gene).sum()
        assert errors[-1] < 1e-3 * moved
        assert errors[-1] <= errors[0] + 1e-6
        assert all(error * n < 4 * moved for error, n in zip(errors, (4, 16, 256), strict=True))  # O(1 / m)

    def test_rows_are_the_window(self, storm, inputs):
        one = attribute_spots(storm, inputs, [14], target_of(storm, 3), n_steps=4, device="cpu")[0]
        assert set(one.rows.tolist()) == set(inputs.windows[14].tolist())
        assert one.image.shape == (9,)
        assert one.gene.shape == (9, len(GENES))

    def test_own_counts_add_nothing_unless_they_are_used(self, storm, inputs):
        for own in (False, True):
            one = attribute_spots(storm, inputs, [14], target_of(storm, 3, own=own), n_steps=4, device="cpu")[0]
            mine = np.abs(one.gene[one.rows == 14])
            assert bool(mine.any()) is own
            assert one.gene[one.rows != 14].any()

    def test_output_is_that_of_the_model(self, storm, inputs):
        one = attribute_spots(storm, inputs, [0, 14], target_of(storm, 3), n_steps=2, device="cpu")
        with torch.no_grad():
            expected = storm.predict(inputs.batch(np.array([0, 14]))).mean[:, 3]
        assert [part.output for part in one] == pytest.approx(expected.tolist(), abs=1e-5)
        assert not storm.training

    def test_genes_that_were_not_measured_add_nothing(self, storm):
        slide = make_slide(n=36)
        few = SlideInputs(slide, storm.inputs, Vocabulary(np.array([*GENES[:6], *(f"NO{i}" for i in range(6))])))
        few.spot_features = np.zeros((36, storm.image.encoder.width), np.float32)
        one = attribute_spots(
            storm, few, [14], target_of(storm, np.ones(width_of(storm, few))), n_steps=4, device="cpu"
        )[0]
        assert not one.gene[:, 6:].any()
        assert one.gene[:, :6].any()

    def test_one_modality(self, storm, inputs):
        for absent in ("image", "gene"):
            one = SlideInputs(make_slide(n=36, **{absent: False}), storm.inputs, storm.vocabulary)
            one.spot_features = inputs.spot_features
            part = attribute_spots(storm, one, [14], target_of(storm, 3), n_steps=64, device="cpu")[0]
            assert getattr(part, absent) is None
            assert part.total == pytest.approx(part.output - part.baseline, abs=2e-2)

    def test_tiles_of_a_model_without_windows(self):
        model = make_model().eval()
        one = SlideInputs(make_slide(n=36), model.inputs, model.vocabulary)
        part = attribute_spots(model, one, [5], target_of(model, np.ones(8)), n_steps=32, device="cpu")[0]
        assert part.rows.tolist() == [5]
        assert part.image.shape == (1,)
        assert part.total == pytest.approx(part.output - part.baseline, abs=1e-3)

    def test_direction_of_another_length(self, storm, inputs):
        with pytest.raises(InputError, match=r"target has shape \(3,\); a direction of this embedding has \d+ values"):
            attribute_spots(storm, inputs, [14], target_of(storm, np.ones(3)), device="cpu")
        with pytest.raises(InputError, match="baseline='black' is unknown"):
            attribute_spots(storm, inputs, [14], target_of(storm, 3), baseline="black")


def test_captum_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(MissingDependencyError, match=r"captum is not installed.*pip install 'stfm\[attribution\]'"):
        gradients(lambda x: x[:, 0], [1.0])
