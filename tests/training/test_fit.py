"""``fit`` on a tiny model of its own: what is trained, kept, recorded, stopped and resumed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from fake_model import FakeModel, make_model, make_slide

from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmError
from stfm.training.engine import fit
from stfm.training.recipes import Recipe

RECIPE = Recipe(epochs=4, batch_size=16, lr=1e-2, warmup=2)


def slides(**kwargs):
    return [make_slide(f"S{i}", 40, seed=i, patient=f"P{i}", **kwargs) for i in range(2)]


def held_out():
    return [make_slide("V", 20, seed=9, patient="PV")]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_clock(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns=["seconds", "spots_per_second"])


def test_history_has_a_row_an_epoch_and_the_loss_falls():
    model = fit(make_model(), slides(), RECIPE, validation=held_out())
    history = model.history
    assert history["epoch"].tolist() == [0, 1, 2, 3]
    assert history["step"].tolist() == [5, 10, 15, 20]
    for name in ("train_loss", "train_spot", "train_context", "val_loss", "lr", "weight_decay", "spots_per_second"):
        assert np.isfinite(history[name]).all(), name
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    assert history["weight_decay"].is_monotonic_increasing
    assert history["weight_decay"].between(0.04, 0.4).all()
    assert not model.training


def test_what_was_seen_is_recorded():
    model = fit(make_model(), slides(), RECIPE, validation=held_out())
    assert model.seen.slides == ["S0", "S1", "V"]
    assert model.seen.patients == ["P0", "P1", "PV"]
    assert model.seen.studies == ["fake-study"]
    assert model.seen.n_spots == 100
    assert Recipe.from_dict(model.seen.recipe) == RECIPE


def test_frozen_parts_stay_as_they_were():
    model = make_model()
    before = state(model.niche)
    fit(model, slides(), RECIPE)
    assert_same(before, state(model.niche))


def test_only_training_slides_fit_the_inputs():
    model = fit(make_model(), slides(), RECIPE, validation=held_out())
    assert model.fitted_on == ["S0", "S1"]
    assert fit(make_model(), slides(), RECIPE, fit_inputs=False).fitted_on == []


def test_errors_are_measured_at_the_end_on_what_was_held_out():
    calls = []

    def calibrate(self, slides, *, held_out):
        calls.append(([one.slide.name for one in slides], held_out, self.training, self.gene.weight.clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeModel, "calibrate", calibrate)
        model = fit(make_model(), slides(), RECIPE, validation=held_out())
        fit(make_model(), slides(), RECIPE)
    assert [call[:3] for call in calls] == [(["V"], True, False), (["S0", "S1"], False, False)]
    assert torch.equal(calls[0][3], model.gene.weight)  # of the best weights


def test_same_seed_same_model_and_the_users_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    one, two = (fit(make_model(), slides(), RECIPE, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert_same(state(one), state(two))
    other = fit(make_model(), slides(), RECIPE, seed=4)
    assert not torch.equal(one.gene.weight, other.gene.weight)


def test_best_weights_come_back():
    validation = held_out()
    recipe = RECIPE.replace(epochs=6, lr=0.3, clip_grad_norm=None)
    best = fit(make_model(), slides(), recipe, validation=validation)
    last = fit(make_model(), slides(), recipe.replace(keep="last"), validation=validation)
    assert not torch.equal(best.gene.weight, last.gene.weight) or best.history["val_loss"].idxmin() == 5


def test_early_stopping():
    recipe = RECIPE.replace(epochs=30, lr=1e-12, patience=2)
    model = fit(make_model(), slides(), recipe, validation=held_out())
    assert 3 <= len(model.history) < 30


def test_nothing_is_written_beside_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(make_model(), slides(), RECIPE)
    assert list(tmp_path.iterdir()) == []
    fit(make_model(), slides(), RECIPE, checkpoint_dir=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "batches": "slide", "count_thinning": 0.3}])
def test_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch, validates, changes):
    validation = held_out() if validates else []
    recipe = RECIPE.replace(**changes)
    whole = fit(make_model(), slides(), recipe, validation=validation)

    from stfm.training import callbacks

    class Killed(BaseException):
        pass

    def die(self, trainer, *args):
        if trainer.current_epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Journal, "on_train_batch_start", die)
        with pytest.raises(Killed):
            fit(make_model(), slides(), recipe, validation=validation, checkpoint_dir=tmp_path)
    resumed = fit(make_model(seed=7), slides(), recipe, validation=validation, checkpoint_dir=tmp_path, resume=True)
    assert_same(state(whole), state(resumed))
    pd.testing.assert_frame_equal(without_clock(whole.history), without_clock(resumed.history))


def test_a_finished_run_resumes_to_itself(tmp_path):
    whole = fit(make_model(), slides(), RECIPE, checkpoint_dir=tmp_path)
    again = fit(make_model(seed=7), slides(), RECIPE, resume=tmp_path / "last.ckpt")
    assert_same(state(whole), state(again))
    assert len(again.history) == 4


def test_a_run_that_stopped_early_resumes_to_itself(tmp_path):
    recipe = RECIPE.replace(epochs=30, lr=1e-12, patience=2)
    whole = fit(make_model(), slides(), recipe, validation=held_out(), checkpoint_dir=tmp_path)
    again = fit(make_model(seed=7), slides(), recipe, validation=held_out(), resume=tmp_path)
    assert len(again.history) == len(whole.history)
    assert_same(state(whole), state(again))


def test_resume_starts_anew_where_there_is_no_checkpoint(tmp_path):
    model = fit(make_model(), slides(), RECIPE, checkpoint_dir=tmp_path, resume=True)
    assert len(model.history) == 4


def test_resume_refuses_what_does_not_fit(tmp_path):
    fit(make_model(), slides(), RECIPE, checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match=r"another run: recipe: batch_size was 16, is 8"):
        fit(make_model(), slides(), RECIPE.replace(batch_size=8), resume=tmp_path)
    with pytest.raises(InputError, match=r"another run: config: width was 8, is 4"):
        fit(make_model(width=4), slides(), RECIPE, resume=tmp_path)
    with pytest.raises(InputError, match="train was"):
        fit(make_model(), slides()[:1], RECIPE, resume=tmp_path)
    with pytest.raises(MissingKeyError, match="no checkpoint at"):
        fit(make_model(), slides(), RECIPE, resume=tmp_path / "no.ckpt")
    with pytest.raises(InputError, match="checkpoint_dir="):
        fit(make_model(), slides(), RECIPE, resume=True)
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataIntegrityError, match="no whole checkpoint"):
        fit(make_model(), slides(), RECIPE, resume=tmp_path / "cut.ckpt")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(DataIntegrityError, match="no checkpoint of stfm"):
        fit(make_model(), slides(), RECIPE, resume=tmp_path / "other.ckpt")


def test_nan_loss_names_the_batch_and_keeps_the_last_checkpoint(tmp_path):
    model = make_model(explode_at=7)  # the third batch of the second epoch
    with pytest.raises(StfmError, match=r"loss is nan \(loss\) in epoch 1, batch 2, with spots of slide .*positions"):
        fit(model, slides(), RECIPE, checkpoint_dir=tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())


def test_slides_of_different_modalities_are_refused():
    mixed = [make_slide("A"), make_slide("B", image=False)]
    with pytest.raises(InputError, match=r"slide 'B' has no H&E, slide 'A' has"):
        fit(make_model(), mixed, RECIPE)


def test_all_frozen_is_refused():
    model = make_model()
    model.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        fit(model, slides(), RECIPE)


def test_bf16_trains():
    model = fit(make_model(), slides(), RECIPE.replace(precision="bf16", epochs=1), accelerator="cpu")
    assert np.isfinite(model.history["train_loss"]).all()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_training_goes_on_from_a_trained_model():
    model = fit(make_model(), slides(), RECIPE)
    model = fit(model, slides(), RECIPE, fit_inputs=False)
    assert len(model.history) == 8
    assert model.seen.slides == ["S0", "S1"]


def test_tiles_are_read_once():
    data = slides()
    readers = [s.tiles for s in data]
    fit(make_model(), data, RECIPE)
    assert [r.n_read for r in readers] == [80, 80]  # 40 spot tiles and 40 niche tiles
    fit(make_model(), data, RECIPE.replace(cache_gb=0.0))
    assert [r.n_read for r in readers] == [400, 400]


def test_interrupting_is_heard_and_heard_again(tmp_path, monkeypatch):
    import signal

    from stfm.training import callbacks

    def interrupt(self, trainer, *args):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(callbacks.Journal, "on_train_batch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), slides(), RECIPE, checkpoint_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is about machines without CUDA")
def test_devices_that_are_not_there():
    with pytest.raises(InputError, match="device='cuda' is not there"):
        fit(make_model(), slides(), RECIPE, accelerator="cuda")


def test_several_devices_need_a_script(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ipykernel", None)
    with pytest.raises(InputError, match="devices=2 needs a script"):
        fit(make_model(), slides(), RECIPE, accelerator="cpu", devices=2)
