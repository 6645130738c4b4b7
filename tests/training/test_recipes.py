"""Recipes: JSON and back, presets, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import make_model
from hypothesis import given
from hypothesis import strategies as st

from stfm._errors import InputError, WrongTypeError
from stfm.models.registry import create, nearest_name
from stfm.slide.genes import Vocabulary
from stfm.training.recipes import RECIPES, Recipe, recipe_for, resolve_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_presets_go_to_json_and_back(name):
    assert Recipe.from_json(RECIPES[name].to_json()) == RECIPES[name]


@given(
    st.builds(
        Recipe,
        epochs=st.integers(1, 10**6),
        lr=st.floats(1e-12, 10),
        batches=st.sampled_from(["mixed", "slide"]),
        patience=st.none() | st.integers(1, 100),
        clip_grad_norm=st.none() | st.floats(1e-3, 1e3),
        betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        stain_jitter=st.floats(0, 1),
    )
)
def test_any_recipe_goes_to_json_and_back(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_paper_preset_is_the_paper():
    paper = RECIPES["paper"]
    assert (paper.optimizer, paper.lr, paper.eps, paper.betas) == ("adamw", 5e-4, 1e-8, (0.9, 0.999))
    assert (paper.weight_decay, paper.weight_decay_end) == (0.04, 0.4)
    baseline = RECIPES["contrastive"]
    assert (baseline.optimizer, baseline.lr, baseline.eps, baseline.betas) == ("adam", 5e-5, 1e-6, (0.9, 0.98))
    assert (baseline.batch_size, baseline.epochs, baseline.weight_decay) == (1024, 15, 0.2)


def test_recipe_of_a_model():
    assert recipe_for("st-align-small") is RECIPES["small"]
    assert recipe_for("st-align-tiny") is RECIPES["tiny"]
    assert recipe_for("st-align") is RECIPES["recommended"]
    assert recipe_for("plip") is RECIPES["contrastive"]


@pytest.mark.parametrize(("max_steps", "epochs"), [(None, 20), (1000, 20), (100, 10), (95, 10), (3, 1)])
def test_many_spots_need_fewer_epochs(max_steps, epochs):
    assert Recipe(epochs=20, max_steps=max_steps).planned_epochs(10) == epochs


def test_overrides():
    asked = resolve_recipe(None, "st-align-tiny", epochs=3, lr=None)
    assert asked == RECIPES["tiny"].replace(epochs=3, max_steps=None)  # epochs asked for are trained in full
    assert resolve_recipe("paper", "st-align-tiny").batch_size == 512
    mine = Recipe(epochs=1)
    assert resolve_recipe(mine, "clip") is not RECIPES["contrastive"]
    with pytest.raises(InputError, match="recipe='papr' is unknown"):
        resolve_recipe("papr", "clip")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"precision": "fp16"}, "precision='fp16'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be"),
        ({"gene_dropout": 1.5}, "gene_dropout must lie"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"epoch": 3}, "no 'epoch'. Did you mean 'epochs'"),
        ({"weight_decay": -1.0}, "weight_decay must lie"),
    ],
)
def test_impossible_recipes_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        Recipe().replace(**changes)


def test_a_number_must_be_one():
    with pytest.raises(WrongTypeError, match="batch_size must be an integer"):
        Recipe(batch_size=2.5)


@pytest.mark.parametrize(("warmup", "total", "steps"), [(0.1, 100, 10), (20, 100, 20), (200, 100, 99), (0.5, 1, 0)])
def test_warmup_leaves_a_step(warmup, total, steps):
    assert Recipe(warmup=warmup).warmup_steps(total) == steps


@pytest.mark.parametrize(
    ("name", "changes", "preset"),
    [
        ("storm-tiny", {}, "storm-small"),
        ("storm-small", {"window": 9}, "storm-small"),
        ("storm-multibranch-small", {"width": 64}, "storm-multibranch-small"),
        ("st-align-tiny", {}, "tiny"),
        ("plip", {}, "contrastive"),
    ],
)
def test_a_model_that_goes_on_keeps_the_recipe_of_its_size(name, changes, preset):
    model = create(name, Vocabulary(np.array(["A", "B", "C"])), pretrained=False, **changes)
    assert nearest_name(model.config) == name
    assert resolve_recipe(None, model) == RECIPES[preset]


def test_a_trained_model_goes_on_with_the_recipe_that_it_was_trained_with():
    model = create("storm-tiny", Vocabulary(np.array(["A", "B", "C"])))
    mine = Recipe(epochs=7, max_steps=9, lr=3e-3, precision="bf16", tune="head")
    model.seen.recipe = mine.to_dict()
    assert resolve_recipe(None, model) == mine.replace(precision="auto", tune="full")
    assert resolve_recipe(None, model, lr=1e-4, tune="lora").tune == "lora"
    assert resolve_recipe("storm", model).epochs == 1000


def test_a_model_that_is_not_registered_has_the_recommended_recipe():
    assert nearest_name(Recipe()) == ""
    assert resolve_recipe(None, make_model()) == RECIPES["recommended"]
