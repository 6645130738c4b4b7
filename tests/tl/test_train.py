"""``tl.train`` on simulated tissue and on a tiny model of its own."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_model import make_model, make_slide

import stfm as sf
from stfm._errors import InputError, MissingKeyError, StfmWarning, WrongTypeError
from stfm.training.recipes import Recipe

RECIPE = Recipe(epochs=2, batch_size=32, lr=1e-3)


@pytest.fixture(scope="module")
def tissue():
    return sf.datasets.toy(n_spots=48, n_patients=3, n_genes=330, mpp=2.0)


@pytest.fixture(scope="module")
def trained(tissue):
    return sf.tl.train(tissue, "st-align-tiny", recipe=RECIPE, genes=100)


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_model_history_and_what_it_saw(tissue, trained):
    assert isinstance(trained.history, pd.DataFrame)
    assert trained.history["epoch"].tolist() == [0, 1]
    assert {"train_loss", "val_loss", "lr", "weight_decay", "seconds"} <= set(trained.history)
    assert np.isfinite(trained.history.to_numpy()).all()
    assert sorted(trained.seen.slides) == ["section_1", "section_2", "section_3"]
    assert sorted(trained.seen.patients) == ["patient_1", "patient_2", "patient_3"]
    assert trained.seen.n_spots == tissue.n_obs
    assert len(trained.vocabulary) == 100
    assert not trained.training


def test_the_data_are_untouched(tissue):
    before = (tissue.X.copy(), tissue.obs.copy(), list(tissue.obsm), list(tissue.uns))
    sf.tl.train(tissue, "st-align-tiny", recipe=RECIPE, epochs=1, genes=50)
    assert (before[0] != tissue.X).nnz == 0
    pd.testing.assert_frame_equal(tissue.obs, before[1])
    assert (list(tissue.obsm), list(tissue.uns)) == before[2:]


def test_saved_and_loaded_bit_for_bit(trained, tmp_path):
    loaded = sf.models.load(trained.save(tmp_path / "model"))
    assert same(trained, loaded)
    assert loaded.seen == trained.seen
    pd.testing.assert_frame_equal(loaded.history, trained.history)


def test_seeded(tissue, trained):
    state = torch.get_rng_state()
    again = sf.tl.train(tissue, "st-align-tiny", recipe=RECIPE, genes=100)
    assert same(trained, again)
    assert torch.equal(state, torch.get_rng_state())
    other = sf.tl.train(tissue, "st-align-tiny", recipe=RECIPE, genes=100, rng=np.random.default_rng(1))
    assert not same(trained, other)


def test_validation_is_patient_wise():
    slides = [make_slide(f"S{i}", 16, seed=i, patient=f"P{i // 2}") for i in range(6)]
    model = sf.tl.train(slides, make_model(), recipe=RECIPE, validation="patient")
    assert "val_loss" in model.history
    assert len(model.fitted_on) == 4
    held = {"S0", "S1", "S2", "S3", "S4", "S5"} - set(model.fitted_on)
    assert held in ({"S0", "S1"}, {"S2", "S3"}, {"S4", "S5"})
    model = sf.tl.train(slides, make_model(), recipe=RECIPE, validation=None)
    assert "val_loss" not in model.history


def test_patience_without_validation_is_told():
    with pytest.warns(StfmWarning, match="patience=3 has no effect, since no slide is held out"):
        sf.tl.train(make_slide(n=16), make_model(), recipe=RECIPE, epochs=1, patience=3)


def test_training_goes_on_from_a_model_and_leaves_it_alone(trained, tissue, tmp_path):
    before = copy.deepcopy(trained)
    further = sf.tl.train(tissue, trained, epochs=1, batch_size=32)
    assert same(before, trained)
    assert not same(before, further)
    assert further.history["epoch"].tolist() == [0, 1, 0]
    assert further.vocabulary == trained.vocabulary
    from_disk = sf.tl.train(tissue, init=trained.save(tmp_path), epochs=1, batch_size=32)
    assert same(further, from_disk)


def test_config_changes(tissue):
    model = sf.tl.train(tissue, "st-align-tiny", config={"lambda1": 0.5}, recipe=RECIPE, epochs=1, genes=50)
    assert model.config.lambda1 == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": "st-align-tinny"}, MissingKeyError, "no model 'st-align-tinny'. Did you mean 'st-align-tiny'"),
        ({"recipe": "fast"}, InputError, "recipe='fast' is unknown"),
        ({"epochs": 0}, InputError, "epochs must be at least 1"),
        ({"precision": "fp16"}, InputError, "precision='fp16'"),
        ({"validation": "spot"}, InputError, "validation='spot' is unknown"),
        ({"validation": ["P7"]}, InputError, "'P7', which is no slide or patient"),
        ({"library_key": "slice"}, MissingKeyError, "no column 'slice'"),
        ({"patient_key": "donor"}, MissingKeyError, "no column 'donor'"),
        ({"layer": "raw"}, MissingKeyError, "no 'raw'"),
        ({"config": {"lamda1": 0.5}}, InputError, "no field 'lamda1'. Did you mean 'lambda1'"),
        ({"accelerator": "tpu"}, InputError, "accelerator='tpu'"),
        ({"devices": 0}, InputError, "devices must be at least 1"),
        ({"init": 3}, WrongTypeError, "init must be a model or the folder"),
        ({"init": "/nowhere"}, MissingKeyError, "no folder /nowhere with a saved model"),
        ({"resume": True}, InputError, "checkpoint_dir="),
        ({"resume": "/nowhere.ckpt"}, MissingKeyError, "no checkpoint at"),
    ],
)
def test_guards(tissue, arguments, error, match):
    model = {} if "init" in arguments else {"model": "st-align-tiny"}
    with pytest.raises(error, match=match):
        sf.tl.train(tissue, **{**model, "recipe": None if "recipe" in arguments else RECIPE, **arguments})


def test_guards_on_the_data(tissue):
    normalised = tissue.copy()
    normalised.X = normalised.X * 0.37
    with pytest.raises(InputError, match="layer="):
        sf.tl.train(normalised, "st-align-tiny", recipe=RECIPE)
    with pytest.raises(InputError, match="no spots"):
        sf.tl.train(tissue[:0].copy(), "st-align-tiny", recipe=RECIPE)
    with pytest.raises(InputError, match="3 spots to train on"):
        sf.tl.train(tissue[:3].copy(), "st-align-tiny", recipe=RECIPE, validation=None)
    with pytest.raises(InputError, match="config= changes a new model"):
        sf.tl.train([make_slide()], make_model(), config={"width": 3})


_KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from fake_model import make_model, make_slide
import stfm as sf
from stfm._settings import settings
from stfm.training.callbacks import Seeds
from stfm.training.recipes import Recipe

settings.cache_dir = {cache!r}
before = Seeds.on_train_batch_start

def wait(self, trainer, *args):
    if trainer.current_epoch == 3:
        Path({sign!r}).touch()
        time.sleep(600)
    before(self, trainer, *args)

Seeds.on_train_batch_start = wait
slides = [make_slide(f"S{{i}}", 30, seed=i, patient=f"P{{i}}") for i in range(3)]
recipe = Recipe(epochs=6, batch_size=16, lr=1e-2)
sf.tl.train(slides, make_model(), recipe=recipe, checkpoint_dir={folder!r}, resume=True)
"""


_RESUMED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from fake_model import make_model, make_slide
import stfm as sf
from stfm._settings import settings
from stfm.training.recipes import Recipe

settings.cache_dir = {cache!r}
slides = [make_slide(f"S{{i}}", 30, seed=i, patient=f"P{{i}}") for i in range(3)]
recipe = Recipe(epochs=6, batch_size=16, lr=1e-2)
runs = {{
    "whole": sf.tl.train(slides, make_model(), recipe=recipe),
    "resumed": sf.tl.train(slides, make_model(), recipe=recipe, checkpoint_dir={folder!r}, resume=True),
}}
for name, model in runs.items():
    torch.save(model.state_dict(), f"{{name}}.pt")
    model.history.to_csv(f"{{name}}.csv", index=False)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_what_it_would_have_been(tmp_path):
    sign, folder = tmp_path / "epoch-3", tmp_path / "run"
    tests = Path(__file__).parents[1] / "training"
    values = {"tests": tests, "cache": tmp_path / "cache", "sign": sign, "folder": folder}
    script = _KILLED.format(**{k: str(v) for k, v in values.items()})
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as killed:
        deadline = time.monotonic() + 240
        while not sign.exists() and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    assert not (tmp_path / "lightning_logs").exists()

    # Both in a new process, as after a real kill: sums and dropout depend on the threads that a process has.
    subprocess.run(
        [sys.executable, "-c", _RESUMED.format(**{k: str(v) for k, v in values.items()})], cwd=tmp_path, check=True
    )
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    before, after = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("whole", "resumed"))
    assert after["epoch"].tolist() == [0, 1, 2, 3, 4, 5]
    clock = ["seconds", "spots_per_second"]
    pd.testing.assert_frame_equal(before.drop(columns=clock), after.drop(columns=clock))


_TWO_DEVICES = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from fake_model import make_model, make_slide
import stfm as sf
from stfm._settings import settings
from stfm.training.recipes import Recipe

settings.cache_dir = {cache!r}
slides = [make_slide(f"S{{i}}", 40, seed=i, patient=f"P{{i}}") for i in range(3)]
recipe = Recipe(epochs=2, batch_size=8, lr=1e-2)
model = sf.tl.train(slides, make_model(), recipe=recipe, devices=2, accelerator="cpu", checkpoint_dir={folder!r})
rank = torch.distributed.get_rank()
torch.save(model.state_dict(), Path({folder!r}) / f"{{rank}}.pt")
model.history.to_csv(Path({folder!r}) / f"{{rank}}.csv", index=False)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_devices(tmp_path):
    folder = tmp_path / "run"
    tests = Path(__file__).parents[1] / "training"
    script = tmp_path / "two.py"  # a file, since Lightning starts it again for the second device
    script.write_text(_TWO_DEVICES.format(tests=str(tests), cache=str(tmp_path / "cache"), folder=str(folder)))
    subprocess.run([sys.executable, "-W", "error", str(script)], check=True, cwd=tmp_path, timeout=400)
    deadline = time.monotonic() + 60
    while not (folder / "1.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    histories = [pd.read_csv(folder / f"{rank}.csv") for rank in (0, 1)]
    # 80 training spots are ten batches of eight, five on each device
    assert histories[0]["step"].tolist() == [5, 10]
    losses = [name for name in histories[0] if "loss" in name]
    pd.testing.assert_frame_equal(histories[0][losses], histories[1][losses])
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    trained = [name for name in one if "running" not in name]
    assert all(torch.equal(one[name], two[name]) for name in trained)
