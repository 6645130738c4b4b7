"""Every registered model goes through the same tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stfm._errors import DataIntegrityError, InputError, MissingKeyError, StfmWarning
from stfm.models import create, list_models, load
from stfm.models.registry import MODELS

NAMES = MODELS.names()
# Full sizes are counted on the meta device; here their encoders are cut short.
VIT = {"name": "uni", "options": {"width": 32, "depth": 2, "heads": 4}}
SHORT_ST_ALIGN = {
    "spot_image": {"name": "ae-img", "options": {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16]}},
    "niche_image": VIT,
    "spot_gene": {"name": "scgpt", "options": {"n_ids": 90, "width": 32, "depth": 2, "heads": 4, "hidden": 32}},
    "niche_gene": {"name": "ae-gene", "options": {"width": 32, "depth": 2, "heads": 4, "n_tokens": 6}},
    "width": 32,
}
TOWER = {"width": 32, "depth": 2, "heads": 4, "out_width": 16}
SHORT_MULTIBRANCH = {"width": 32, "depth": 3, "specific": 2, "heads": 4, "gene_width": 8, "decoder_depth": 1}
SHORT_STORM = {
    "image": {"name": "h0-mini", "options": {"patch": 56, "width": 32, "depth": 2, "heads": 4, "registers": 4}},
    "width": 32, "depth": 2, "heads": 4, "gene_width": 8,
}  # fmt: skip
SHORT = {
    "storm": SHORT_STORM,
    "storm-paper": SHORT_STORM,
    "st-align": SHORT_ST_ALIGN,
    "st-align-paper": SHORT_ST_ALIGN,
    "storm-multibranch": SHORT_MULTIBRANCH | {"tile_px": 32, "n_bins": 8},
    "storm-multibranch-base": SHORT_MULTIBRANCH | {"specific": 1},
    "clip": {"image": {"name": "clip-vit-b32", "options": TOWER}},
    "plip": {"image": {"name": "plip-vit-b32", "options": TOWER}},
}

each_model = pytest.mark.parametrize("name", NAMES)
each_model_of_both = pytest.mark.parametrize("name", [n for n in NAMES if MODELS.get(n).factory.reads_genes])


def make(name: str, vocabulary, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return create(name, vocabulary, pretrained=False, **{**SHORT.get(name, {}), **changes})


def trained(name: str, vocabulary, make_batch, **changes):
    """A model whose running statistics are not those of the start."""
    model = make(name, vocabulary, **changes).train()
    for seed in range(3):
        model.losses(make_batch(model, seed=seed))
    return model.eval()


def parts(embedding) -> dict[str, torch.Tensor]:
    return {k: v for k, v in vars(embedding).items() if v is not None}


def test_table_has_sizes():
    table = list_models()
    assert list(table.index) == NAMES
    assert {"st-align", "st-align-paper", "st-align-small", "st-align-tiny", "clip", "plip"} <= set(NAMES)
    assert (table["parameters"] > 1000).all()
    assert 380e6 < table.loc["st-align", "parameters"] < 420e6
    assert 87.8e6 < table.loc["clip", "parameters"] < 88.1e6
    assert table.loc["st-align-small", "parameters"] < 1.5e6


@each_model
def test_losses_are_scalars_with_gradients(name: str, vocabulary, make_batch):
    model = make(name, vocabulary).train()
    losses = model.losses(make_batch(model))
    assert all(v.ndim == 0 and torch.isfinite(v) for v in losses.values())
    losses["loss"].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # distributed training refuses parameters that no loss reaches


@each_model
def test_one_spot_is_no_training_batch(name: str, vocabulary, make_batch):
    model = make(name, vocabulary)
    with pytest.raises(InputError, match="at least 2 spots a batch"):
        model.train().losses(make_batch(model, n=1))


@each_model
def test_embedding_shapes(name: str, vocabulary, make_batch):
    model = make(name, vocabulary).eval()
    embedding = model.embed(make_batch(model, n=5))
    for part in parts(embedding).values():
        assert part.ndim == 2
        assert len(part) == 5
        assert part.dtype == torch.float32
        assert torch.isfinite(part).all()
    if model.reads_genes:
        assert embedding.image.shape == embedding.gene.shape
    else:
        assert embedding.gene is None


@each_model
def test_same_for_any_batch_size_and_order(name: str, vocabulary, make_batch):
    model = trained(name, vocabulary, make_batch)
    batch = make_batch(model, n=6, seed=7)
    with torch.no_grad():
        whole = parts(model.embed(batch))
        order = torch.tensor([4, 1, 5, 0, 2, 3])
        shuffled = parts(model.embed(batch.take(order)))
        single = [parts(model.embed(batch.take(torch.tensor([i])))) for i in range(6)]
    for key, value in whole.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(shuffled[key], value[order], atol=1e-5 * scale, rtol=1e-4)
        torch.testing.assert_close(torch.cat([s[key] for s in single]), value, atol=1e-5 * scale, rtol=1e-4)


@each_model
def test_saved_and_loaded_bit_for_bit(name: str, vocabulary, make_batch, tmp_path: Path):
    model = trained(name, vocabulary, make_batch)
    batch = make_batch(model, seed=3)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert again.vocabulary == model.vocabulary
    assert again.weights_sha256() == model.weights_sha256()
    with torch.no_grad():
        for key, value in parts(model.embed(batch)).items():
            assert torch.equal(getattr(again.embed(batch), key), value)


@each_model
def test_seeded(name: str, vocabulary, make_batch):
    first, second, other = make(name, vocabulary), make(name, vocabulary), make(name, vocabulary, seed=1)
    assert first.weights_sha256() == second.weights_sha256()
    assert first.weights_sha256() != other.weights_sha256()


@each_model_of_both
@pytest.mark.parametrize("absent", ["image", "gene"])
def test_missing_modality(name: str, absent: str, vocabulary, make_batch):
    model = trained(name, vocabulary, make_batch)
    batch = make_batch(model)
    with torch.no_grad():
        whole, partial = model.embed(batch), model.embed(batch.without(absent))
    assert getattr(partial, absent) is None
    assert partial.joint.shape == whole.joint.shape
    assert torch.isfinite(partial.joint).all()
    present = "gene" if absent == "image" else "image"
    torch.testing.assert_close(getattr(partial, present), getattr(whole, present))
    if model.stages:
        model.stage = "align"
    with pytest.raises(InputError, match="has no (image|counts|H&E)"):
        model.losses(batch.without(absent))
    with pytest.raises(InputError, match="missing|neither"):
        model.embed(batch.without("image", "gene"))


@each_model
def test_genes_that_were_not_measured_are_not_read(name: str, vocabulary, make_batch):
    from dataclasses import replace

    model = trained(name, vocabulary, make_batch)
    batch = make_batch(model)
    mask = torch.ones(8, len(vocabulary), dtype=torch.bool)
    mask[:4, ::4] = False
    noisy = {k: torch.where(mask, v, 9.0) for k, v in batch.tensors().items() if "counts" in k}
    with torch.no_grad():
        clean = model.embed(replace(batch, gene_mask=mask)).joint
        torch.testing.assert_close(model.embed(replace(batch, gene_mask=mask, **noisy)).joint, clean)


@each_model
def test_mixed_precision(name: str, vocabulary, make_batch):
    model = make(name, vocabulary).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.losses(make_batch(model))["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@each_model_of_both
def test_a_frozen_image_encoder_takes_features_for_tiles(name: str, vocabulary, make_batch):
    from dataclasses import replace

    model = make(name, vocabulary).eval()
    batch = make_batch(model)
    for level in ("spot", "niche"):
        encoder, tiles = model.frozen_image_encoder(level), getattr(batch, f"{level}_tiles")
        if tiles is None:
            assert encoder is None
        elif encoder is None:
            with pytest.raises(InputError, match="is not frozen"):
                model.embed(replace(batch, **{f"{level}_features": torch.zeros(8, 4), f"{level}_tiles": None}))
        else:
            with torch.no_grad():
                each = encoder(tiles.flatten(0, -4)).unflatten(0, tiles.shape[:-3]).flatten(1)
                fed = replace(batch, **{f"{level}_features": each, f"{level}_tiles": None})
                for key, value in parts(model.embed(batch)).items():
                    torch.testing.assert_close(getattr(model.embed(fed), key), value)


@each_model
def test_a_step_changes_what_is_trained_and_nothing_else(name: str, vocabulary, make_batch):
    model = make(name, vocabulary).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        optimiser.zero_grad()
        model.losses(make_batch(model, seed=seed))["loss"].backward()
        optimiser.step()
    same = {n for n, p in model.named_parameters() if torch.equal(p.detach(), before[n])}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= same
    assert len(same - frozen) < len(before) - len(frozen)


def test_checkpoint_of_another_architecture(vocabulary, make_batch, tmp_path: Path):
    small = make("st-align-tiny", vocabulary)
    small.save(tmp_path / "a")
    make("clip-small", vocabulary).save(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(DataIntegrityError, match="checkpoint of another architecture"):
        load(tmp_path / "a")
    description = json.loads((tmp_path / "a" / "config.json").read_text())
    description["config"]["widht"] = 3
    (tmp_path / "a" / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="no field 'widht'"):
        load(tmp_path / "a")
    with pytest.raises(MissingKeyError, match="no saved model"):
        load(tmp_path / "c")


def test_create_says_what_is_wrong(vocabulary):
    with pytest.raises(MissingKeyError, match="no model 'st-allign'. Did you mean"):
        create("st-allign", vocabulary)
    with pytest.raises(InputError, match="no field 'widht'. Did you mean 'width'"):
        create("st-align-tiny", vocabulary, widht=3)
    with pytest.raises(InputError, match="needs a vocabulary"):
        create("st-align-tiny")


def test_random_weights_in_the_place_of_published_ones_are_told(vocabulary):
    with pytest.warns(StfmWarning, match="'plip-vit-b32' starts from random weights"):
        create("plip", vocabulary, **SHORT["plip"])
