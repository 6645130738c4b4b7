"""Fine-tuning of a trained model: in full, its heads, or low-rank additions that are merged at the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import GENES, make_model, make_slide

from stfm import tl
from stfm.errors import InputError, MissingDependencyError, StfmWarning
from stfm.models import create, load
from stfm.slide.genes import Vocabulary
from stfm.training.recipes import Recipe

RECIPE = Recipe(epochs=1, batch_size=24, lr=1e-3, weight_decay_end=0.04, stain_jitter=0.0)
STORM = {"contexts_um": (112.0,), "spot_px": 16, "window": 9, "width": 16, "heads": 2, "gene_width": 4}
BRANCHES = {"tile_px": 28, "patch_px": 14, "width": 16, "heads": 2, "depth": 2, "specific": 1, "gene_width": 8,
            "bias_hidden": 4}  # fmt: skip
NAMES = {"storm": ("storm-tiny", STORM), "storm-multibranch": ("storm-multibranch-small", BRANCHES)}
DECODERS = ("image_decoder.", "gene_decoder.", "image_log_variance")
ALIGN = ("align_heads.", "temperature.")


def slides(**kwargs):
    return [make_slide(f"S{i}", 36, seed=i, patient=f"P{i}", **kwargs) for i in range(2)]


def train(data=None, model: object = "storm-tiny", **options):
    return tl.train(slides() if data is None else data, model, **{"recipe": RECIPE, "validation": None, **options})


def moved(a, b) -> set[str]:
    now = dict(b.named_parameters())
    return {name for name, p in a.named_parameters() if not torch.equal(p, now[name])}


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    name, config = NAMES[request.param]
    return train(model=name, config=config)


@pytest.fixture(scope="module")
def storm():
    return train(config=STORM)


def attention(name: str) -> bool:
    blocks = name.startswith(("spatial.blocks.", "encoder."))
    return blocks and name.endswith((".attention.q.weight", ".attention.v.weight"))


def test_full_moves_more_than_the_heads(trained):
    names = moved(trained, train(model=trained, tune="full"))
    assert any(n.endswith(".attention.k.weight") for n in names)
    assert any(n.startswith("gene_decoder.") for n in names)


def test_head_moves_decoders_and_alignment_heads_alone(trained):
    tuned = train(model=trained, tune="head")
    names = moved(trained, tuned)
    heads = DECODERS if trained.family == "storm-multibranch" else (*DECODERS, *ALIGN)
    assert names
    assert all(name.startswith(heads) for name in names)
    assert {head for head in heads if any(n.startswith(head) for n in names)} >= {"gene_decoder.", "image_decoder."}
    stages = ["mask"] if trained.family == "storm-multibranch" else ["mask", "align"]
    assert tuned.history["stage"].tolist()[-len(stages) :] == stages
    assert tuned.seen.recipe["tune"] == "head"
    assert any(name.startswith("align_heads.") for name in names) == (trained.family == "storm")


def test_low_rank_additions_are_merged_into_a_plain_model(trained, tmp_path):
    pytest.importorskip("peft")
    tuned = train(model=trained, tune="lora")
    assert list(tuned.state_dict()) == list(trained.state_dict())
    assert {type(m) for m in tuned.modules()} == {type(m) for m in trained.modules()}
    names = moved(trained, tuned)
    assert {n for n, _ in trained.named_parameters() if attention(n)} == {n for n in names if attention(n)}
    assert all(attention(n) or n.startswith((*DECODERS, *ALIGN)) for n in names)
    some = next(n for n in sorted(names) if attention(n))
    change = tuned.state_dict()[some] - trained.state_dict()[some]
    assert int((torch.linalg.svdvals(change) > 1e-6).sum()) <= RECIPE.lora_rank
    again = load(tuned.save(tmp_path / "m"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tuned.state_dict().items())
    assert [p.requires_grad for p in tuned.parameters()] == [p.requires_grad for p in trained.parameters()]


def test_a_tuned_model_is_trained_further_in_full(storm):
    tuned = train(model=storm, tune="head", stage="mask")
    again = train(model=tuned, recipe=None, epochs=1, stage="mask")
    assert again.seen.recipe["tune"] == "full"
    assert any(n.startswith("spatial.") for n in moved(tuned, again))


def test_low_rank_training_goes_on_after_a_stop(storm, tmp_path):
    pytest.importorskip("peft")
    how = {"model": storm, "tune": "lora", "stage": "mask"}
    whole = train(**how, checkpoint_dir=tmp_path)
    resumed = train(**how, checkpoint_dir=tmp_path, resume=True)
    assert not moved(whole, resumed)
    with pytest.raises(InputError, match="recipe: tune was 'lora', is 'head'"):
        train(model=storm, tune="head", stage="mask", checkpoint_dir=tmp_path, resume=True)


def test_without_peft_the_extra_is_named(storm, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"stfm\[lora\]"):
        train(model=storm, tune="lora")


def test_what_cannot_be_tuned_is_refused(storm):
    with pytest.raises(InputError, match="tune='lora' adapts a trained model"):
        train(tune="lora", config=STORM)
    with pytest.raises(InputError, match="tune='lara' is unknown. Did you mean 'lora'"):
        train(model=storm, tune="lara")
    with pytest.raises(InputError, match="is for models with decoders .storm, storm-multibranch.; a 'fake' model"):
        train(model=make_model(), tune="head")
    low = create("storm-multibranch-small", Vocabulary(GENES), **BRANCHES, mode="lora")
    with pytest.raises(InputError, match="adapted already"):
        train(model=low, tune="head")


def test_head_of_two_branches_has_no_alignment():
    model = create("storm-multibranch-small", Vocabulary(GENES), **BRANCHES)
    with pytest.raises(InputError, match="tune='head' leaves nothing to train in stage 'align'; take stage='mask'"):
        train(model=model, tune="head", stage="align")
    decoders = model.adapted("head")
    assert decoders.stages == ("mask",)
    assert model.stages == ("mask", "align")
    assert train(model=decoders).history["stage"].tolist() == ["mask"]
    with pytest.raises(InputError, match="take stage='mask'"):
        train(model=decoders, stage="align")


def test_what_init_brings_is_not_asked_for_again(storm):
    with pytest.raises(InputError, match="model='storm-small' has no place beside it"):
        train(model="storm-small", init=storm)
    with pytest.raises(InputError, match="keeps its genes"):
        tl.train(slides(), init=storm, genes="all")
    with pytest.raises(InputError, match="keeps its genes"):
        tl.train(slides(), storm, genes=list(GENES[:4]))


@pytest.mark.parametrize("absent", ["image", "gene"])
def test_both_stages_are_refused_before_the_first_where_one_cannot_run(absent: str, monkeypatch):
    from stfm.training import engine

    monkeypatch.setattr(engine, "fit", lambda *args, **kwargs: pytest.fail("a stage was trained"))
    lacking = "H&E" if absent == "image" else "counts"
    data = slides(**{absent: False})
    with pytest.raises(InputError, match=f"slide 'S0' has no {lacking}, and alignment needs both .* stage='mask' can"):
        train(data, config=STORM, genes=Vocabulary(GENES))
    with pytest.raises(InputError, match=f"has no {lacking}, and every stage of 'storm-multibranch' needs both"):
        train(data, "storm-multibranch-small", config=BRANCHES, genes=Vocabulary(GENES), stage="mask")
    with pytest.raises(InputError, match="the model reads no H&E, and alignment needs both"):
        train(config={**STORM, "ablation": "no-image"})


def test_tiles_that_hold_places_are_not_turned():
    model = create("storm-multibranch-small", Vocabulary(GENES), **BRANCHES, window=3)
    assert not model.flippable
    assert create("storm-multibranch-small", Vocabulary(GENES), **BRANCHES).flippable
    assert create("storm-tiny", Vocabulary(GENES), **STORM).flippable
    with pytest.warns(StfmWarning, match="neither turned nor mirrored"):
        trained = train(model=model, stage="mask")
    assert trained.seen.recipe["flips"] is False
    assert np.isfinite(trained.history["train_loss"]).all()
