"""Models stored in half the bytes, cards with numbers, and the hub (a stand-in for it)."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stfm as sf
from stfm._errors import InputError, MissingDependencyError, StfmWarning
from stfm.models._half import stored
from stfm.models.base import CARD_FILE, CONFIG_FILE, GENES_FILE, WEIGHTS_FILE
from stfm.slide.genes import Vocabulary

GENES = Vocabulary(np.array([f"GENE{i}" for i in range(60)]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = sf.models.create("st-align-tiny", GENES)
    made.seen.studies.append("her2st")
    made.seen.platforms.append("ST")
    made.about.name = "tiny"
    made.about.licence = "bsd-3-clause"
    made.about.text = "A model of nothing."
    made.about.results = {"her2st-loso": {"r": 0.25, "share": 0.5}, "mob": {"r": 0.125}}
    return made


@pytest.mark.parametrize("name", ["st-align-tiny", "storm-multibranch-small"])
def test_half_the_bytes_and_the_same_embedding(name, tmp_path, make_batch, vocabulary):
    torch.manual_seed(0)
    model = sf.models.create(name, vocabulary).eval()
    full = model.save(tmp_path / "full")
    half = model.save(tmp_path / "half", dtype="fp16")
    back = sf.models.load(half)
    assert (half / WEIGHTS_FILE).stat().st_size < 0.65 * (full / WEIGHTS_FILE).stat().st_size
    assert json.loads((half / CONFIG_FILE).read_text())["dtype"] == "fp16"
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    batch = make_batch(model)
    with torch.no_grad():
        before, after = model.embed(batch).joint, back.embed(batch).joint
    assert 0 < (after - before).norm() / before.norm() < 1e-2
    again = sf.models.load(back.save(tmp_path / "again", dtype="fp16"))
    assert again.weights_sha256() == back.weights_sha256(), "what was rounded once is rounded no further"


def test_what_fp16_cannot_hold_stays():
    generator = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(8, 8, generator=generator),
        "bias": torch.randn(8, generator=generator),
        "big": torch.full((4, 4), 1e6),
        "small": torch.full((4, 4), 1e-9),
        "none": torch.zeros(4, 4),
        "index": torch.arange(6).reshape(2, 3),
        "double": torch.randn(4, 4, generator=generator, dtype=torch.float64),
    }
    kept = stored(state, "fp16")
    half = {name for name, tensor in kept.items() if tensor.dtype == torch.float16}
    assert half == {"matrix", "none", "double"}
    for name in set(state) - half:
        assert torch.equal(kept[name], state[name])
    torch.testing.assert_close(kept["matrix"].float(), state["matrix"], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(one, state[name]) for name, one in stored(state, "fp32").items())


def test_another_dtype_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(InputError, match="dtype='int4' is unknown"):
        model.save(tmp_path / "model", dtype="int4")
    assert not (tmp_path / "model").exists()


def test_what_a_person_says_comes_back_and_stands_in_the_card(model, tmp_path):
    folder = model.save(tmp_path / "model")
    assert sf.models.load(folder).about == model.about
    card = (folder / CARD_FILE).read_text()
    front = card.split("---")[1]
    assert "library_name: stfm" in front
    assert 'license: "bsd-3-clause"' in front
    assert "- st-align" in front
    assert "# tiny (" in card
    assert "A model of nothing." in card
    assert "* studies: her2st\n" in card
    assert "* platforms: ST\n" in card
    assert "* patients: not recorded\n" in card
    assert "| protocol | r | share |\n|---|---|---|\n| her2st-loso | 0.25 | 0.5 |\n| mob | 0.125 |  |" in card


def test_results_are_numbers(model, tmp_path):
    model.about.results["mob"] = 0.3
    with pytest.raises(InputError, match=r"about\.results\['mob'\] must map metrics to numbers"):
        model.save(tmp_path / "model")


def test_models_of_older_versions_load(model, tmp_path):
    folder = model.save(tmp_path / "model")
    description = json.loads((folder / CONFIG_FILE).read_text())
    del description["about"], description["dtype"], description["seen"]["platforms"], description["seen"]["species"]
    del description["seen"]["adapted_from"]
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    back = sf.models.load(folder)
    assert back.weights_sha256() == model.weights_sha256()
    assert back.about.results == {}
    assert back.seen.adapted_from == []


class _Hub:
    """Takes what it is sent, or refuses."""

    def __init__(self, token=None, error: Exception | None = None) -> None:
        self.token, self.error, self.sent = token, error, {}

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.sent |= {"repo": repo_id, "private": private, "exist_ok": exist_ok}

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
        from pathlib import Path

        files = {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}
        self.sent |= {"files": files, "message": commit_message, "revision": revision, "to": repo_id}
        self.card = (Path(folder_path) / CARD_FILE).read_text()


@pytest.fixture
def hub(monkeypatch):
    api = _Hub()

    def start(token=None):
        api.token = token
        return api

    errors = SimpleNamespace(HfHubHTTPError=ConnectionError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=start, errors=errors))
    return api


def test_push_sends_the_folder_that_save_writes(model, hub):
    with sf.settings.override(offline=False):
        address = model.push_to_hub("me/tiny", token="t", private=True, dtype="fp16", message="first", revision="next")
    assert address == "https://huggingface.co/me/tiny"
    assert hub.token == "t"
    assert (hub.sent["repo"], hub.sent["to"], hub.sent["private"]) == ("me/tiny", "me/tiny", True)
    assert {WEIGHTS_FILE, CONFIG_FILE, GENES_FILE, CARD_FILE} <= set(hub.sent["files"])
    assert (hub.sent["message"], hub.sent["revision"]) == ("first", "next")
    assert "(fp16)" in hub.card
    assert "her2st-loso" in hub.card


def test_weights_of_others_are_told(hub, tmp_path):
    options = {"width": 16, "depth": 1, "heads": 2, "hidden": 16}
    torch.save(sf.encoders.build_encoder("uni", options=options).published_state(), tmp_path / "uni.pt")
    slot = {"name": "uni", "options": options, "weights": str(tmp_path / "uni.pt")}
    model = sf.models.create("st-align-tiny", GENES, spot_image=slot)
    told = r"holds weights of uni \(CC BY-NC-ND 4.0, gated\); see that you may pass them on"
    with sf.settings.override(offline=False), pytest.warns(StfmWarning, match=told):
        model.push_to_hub("me/tiny")
    assert "## Weights of others" in hub.card
    assert "* uni (CC BY-NC-ND 4.0, gated)\n" in hub.card
    with pytest.warns(StfmWarning, match="starts from random weights"):
        scratch = sf.models.create("st-align-tiny", GENES, spot_image={**slot, "weights": None})
    assert "Weights of others" not in (scratch.save(tmp_path / "scratch") / CARD_FILE).read_text()


def test_push_says_why_not(model, hub, monkeypatch):
    with pytest.raises(InputError, match="STFM_OFFLINE is set"):
        model.push_to_hub("me/tiny")
    hub.error = OSError("403 Forbidden")
    with sf.settings.override(offline=False), pytest.raises(InputError, match="could not push to .*403.*HF_TOKEN"):
        model.push_to_hub("me/tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'stfm\[hub\]'"):
        model.push_to_hub("me/tiny")


def test_no_folder_of_this_machine_is_shared(tmp_path):

    from stfm.models import create
    from stfm.models.distillation import DistillationConfig

    start = create("distil-tiny", pretrained=False).image.backbone.state_dict()
    torch.save(start, tmp_path / "tower.pt")
    image = {"name": "cnn-tiny", "weights": str(tmp_path / "tower.pt")}
    model = create(DistillationConfig(image=image, tile_px=28, teacher_px=56))
    folder = model.save(tmp_path / "model")
    for name in ("config.json", "README.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "tower.pt" in text
        assert str(tmp_path) not in text
    assert sf.models.load(folder).config.image.weights == "tower.pt"
