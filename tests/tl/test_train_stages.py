"""``tl.train`` of a model that is pretrained in stages: their order, what they need, resuming through both."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from fake_model import GENES, make_model, make_slide

from stfm import tl
from stfm.errors import InputError, StfmError
from stfm.models import create, load
from stfm.slide.genes import Vocabulary
from stfm.training import callbacks
from stfm.training.recipes import Recipe

RECIPE = Recipe(epochs=2, batch_size=24, lr=1e-3, weight_decay_end=0.04)
CONFIG = {"contexts_um": (112.0,), "spot_px": 16, "window": 9, "width": 16, "heads": 2, "gene_width": 4}


def slides(**kwargs):
    return [make_slide(f"S{i}", 36, seed=i, patient=f"P{i}", **kwargs) for i in range(2)]


def train(data=None, model: object = "storm-tiny", **options):
    if isinstance(model, str):
        options = {"config": CONFIG, **options}
    return tl.train(slides() if data is None else data, model, **{"recipe": RECIPE, "validation": None, **options})


def same(a, b) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def without_clock(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns=["seconds", "spots_per_second"])


@pytest.fixture(scope="module")
def both():
    return train()


def test_masking_then_alignment(both, tmp_path):
    assert both.history["stage"].tolist() == ["mask", "mask", "align", "align"]
    assert both.history["train_align"].isna().tolist() == [True, True, False, False]
    assert np.isfinite(both.history[["train_loss", "train_image", "train_gene"]].to_numpy()).all()
    assert both.seen.n_spots == 72  # spots, however often they were looked at
    assert both.seen.slides == ["S0", "S1"]
    again = load(both.save(tmp_path / "m"))
    assert same(again, both)
    pd.testing.assert_frame_equal(again.history, both.history)


def test_one_stage_after_the_other_is_both(both):
    first = train(stage="mask")
    assert set(first.history["stage"]) == {"mask"}
    assert (first.history["train_loss"].diff().iloc[1:] < 0).all()
    assert same(train(model=first, stage="align"), both)


def test_what_a_fitted_model_brings_is_not_fitted_again():
    first = train(stage="mask")
    other = [make_slide("S9", 36, seed=9)]
    again = train(other, first, stage="mask", epochs=1)
    assert torch.equal(again.table.mean, first.table.mean)
    assert again.seen.slides == ["S0", "S1", "S9"]


class Killed(BaseException):
    """As from outside."""


@pytest.mark.parametrize("killed_in", ["mask", "align"])
def test_resumed_after_a_kill_equals_an_unbroken_run(both, killed_in: str, tmp_path, monkeypatch):
    def die(self, trainer, *args):
        if trainer.current_epoch == 1 and self.module.model.stage == killed_in:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Journal, "on_train_batch_start", die)
        with pytest.raises(Killed):
            train(checkpoint_dir=tmp_path, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["mask"] if killed_in == "mask" else ["align", "mask"])
    assert (tmp_path / killed_in / "last.ckpt").exists()
    resumed = train(checkpoint_dir=tmp_path, resume=True)
    assert same(resumed, both)
    pd.testing.assert_frame_equal(without_clock(resumed.history), without_clock(both.history))
    assert resumed.seen == both.seen


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    train(stage="mask", checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match="belongs to another run: stage was 'mask', is 'align'"):
        train(stage="align", resume=tmp_path / "mask")


@pytest.mark.parametrize("absent", ["image", "gene"])
def test_one_modality_masks_but_does_not_align(absent: str):
    data = slides(**{absent: False})
    genes = Vocabulary(GENES)
    trained = train(data, stage="mask", genes=genes, epochs=1)
    assert np.isfinite(trained.history["train_loss"]).all()
    assert ("train_image" in trained.history) == (absent == "gene")
    assert trained.written_genes().all() == (absent == "image")
    lacking = "H&E" if absent == "image" else "counts"
    with pytest.raises(InputError, match=f"has no {lacking}, and alignment needs both modalities; stage='mask' can"):
        train(data, stage="align", genes=genes, epochs=1)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    from stfm.models.storm import STORM

    right, calls = STORM._image_loss, []

    def wrong(self, *args):
        calls.append(1)
        return right(self, *args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(STORM, "_image_loss", wrong)
    with pytest.raises(StfmError, match=r"loss is nan \(loss, image\) in epoch 1, batch 1, with spots of slide 'S"):
        train(checkpoint_dir=tmp_path)
    kept = torch.load(tmp_path / "mask" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0


def test_errors_are_measured_once_after_the_last_stage(monkeypatch):
    from stfm.models.storm import STORM

    right, stages = STORM.calibrate, []

    def noted(self, *args, **options):
        stages.append(self.stage)
        return right(self, *args, **options)

    monkeypatch.setattr(STORM, "calibrate", noted)
    train(stage="both")
    assert stages == ["align"]


def test_weights_that_are_nan_ask_for_a_lower_rate():
    data = slides()
    model = create("storm-tiny", Vocabulary(GENES), **CONFIG)
    with torch.no_grad():
        model.spatial.modality.fill_(float("nan"))
    with pytest.raises(StfmError, match="lower lr or clip_grad_norm"):
        train(data, model)


def test_guards():
    with pytest.raises(InputError, match="stage='alin' is unknown. Did you mean 'align'"):
        train(stage="alin")
    with pytest.raises(InputError, match="stage='mask' has no meaning for 'fake'"):
        train(model=make_model(), stage="mask")
    with pytest.raises(InputError, match="a window of 9 spots is larger than slide 'S0', which has 8"):
        train([make_slide("S0", 8)])
    with pytest.raises(InputError, match="it has no 'mask'"):
        make_model().stage = "mask"
