"""How a model is trained, as one frozen dataclass that goes to JSON and back, and the presets by name."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, check_range, did_you_mean
from stfm.models.registry import nearest_name

if TYPE_CHECKING:
    from stfm.models.base import Model

__all__ = ["RECIPES", "Recipe", "recipe_for", "recipe_of", "resolve_recipe"]

_CHOICES = {
    "optimizer": ("adamw", "adam"),
    "batches": ("mixed", "slide"),
    "balance": ("spots", "slides"),
    "precision": ("auto", "fp32", "bf16"),
    "keep": ("best", "last"),
    "tune": ("full", "head", "lora"),
    "changed": ("all", "spot"),
}
_SHARES = (
    "min_lr_ratio",
    "layer_decay",
    "validation_fraction",
    "crop",
    "stain_jitter",
    "count_thinning",
    "gene_dropout",
)
_COUNTS = ("epochs", "max_steps", "batch_size", "accumulate", "patience", "checkpoint_every", "lora_rank")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run beside the data and the model.

    Parameters
    ----------
    epochs
        Passes over the training spots.
    max_steps
        Fewer epochs where there are many spots: training is planned for the epoch in which so many steps are reached.
        Long contrastive training tells single spots apart and loses the domains that they share.
    batch_size
        Spots in a batch and device. Batches of an epoch are cut nearly equal, so that none is tiny.
    accumulate
        Batches whose gradients are summed before a step. The negatives of a contrastive loss come from one batch and do
        not accumulate: more of them need a larger ``batch_size``.
    batches
        ``"mixed"``: a batch holds spots of any slide. ``"slide"``: of one slide.
    balance
        ``"spots"``: an epoch holds every spot once. ``"slides"``: slides have equal shares of it, those of few spots as
        much as large ones.
    optimizer
        ``"adamw"``, or ``"adam"`` (weight decay as an L2 term) as the CLIP and PLIP baselines.
    lr
        Highest learning rate.
    min_lr_ratio
        Last learning rate as a share of ``lr``.
    layer_decay
        Factor by which the learning rate falls from one layer of the model to the one before it; 1 is the same for all.
    warmup
        Length of the linear warm-up: a share of all steps below 1, a number of steps from 1 on.
    weight_decay
        Weight decay at the start.
    weight_decay_end
        Weight decay at the end, reached along a cosine.
    betas
        Betas of Adam.
    eps
        Epsilon of Adam.
    decay_all
        Also decay biases, norms and temperatures (vectors and scalars), which are spared otherwise.
    clip_grad_norm
        Largest norm of the gradient; ``None`` leaves it alone.
    precision
        ``"bf16"`` (autocast), ``"fp32"`` or ``"auto"``: bf16 on CUDA devices that have it, fp32 elsewhere.
    validation_fraction
        Share of the patients or sections held out, at least one, where the validation is not named in full.
    patience
        Epochs without a better validation loss after which training stops; ``None`` trains to the end.
    keep
        Weights returned: those of the ``"best"`` validation loss, or the ``"last"``. Without validation, the last.
    checkpoint_every
        Epochs between two checkpoints.
    tune
        What of a trained model is trained further: ``"full"``: all that is not frozen; ``"head"``: decoders and heads;
        ``"lora"``: these, and low-rank additions to the maps to queries and values of the blocks, through ``peft``,
        which are merged into the weights at the end.
    lora_rank, lora_alpha
        Rank of the additions, and the number that scales them (α / rank).
    changed
        Which tiles of a spot are turned, cut and stained anew: ``"all"``, alike, as two looks at one picture, or the
        ``"spot"`` tile alone.
    flips
        Turn and mirror tiles at random.
    crop
        Largest share of a tile's side that is cut away at random, the rest shown at the tile's size; 0 is off.
    stain_jitter
        Largest relative change of haematoxylin, eosin and residual in optical density; 0 is off.
    count_thinning
        Largest share of the counts dropped at random (binomial, one share a slide and epoch); 0 is off.
    gene_dropout
        Share of the genes of a batch set to zero; 0 is off.
    cache_gb
        Decoded tiles (uint8) kept in memory so that an epoch does not read the image again; slides beyond it are read
        each time.
    """

    epochs: int = 40
    max_steps: int | None = None
    batch_size: int = 256
    accumulate: int = 1
    batches: Literal["mixed", "slide"] = "mixed"
    balance: Literal["spots", "slides"] = "spots"
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 5e-4
    min_lr_ratio: float = 0.0
    layer_decay: float = 1.0
    warmup: float = 0.1
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_all: bool = False
    clip_grad_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validation_fraction: float = 0.2
    patience: int | None = None
    keep: Literal["best", "last"] = "best"
    checkpoint_every: int = 1
    tune: Literal["full", "head", "lora"] = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    changed: Literal["all", "spot"] = "all"
    flips: bool = True
    crop: float = 0.0
    stain_jitter: float = 0.0
    count_thinning: float = 0.0
    gene_dropout: float = 0.0
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in _COUNTS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in _SHARES:
            check_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("lr", "eps", "lora_alpha"):
            check_positive(name, getattr(self, name))
        for name in ("warmup", "weight_decay", "weight_decay_end", "cache_gb"):
            check_range(name, getattr(self, name), 0.0, float("inf"))
        if self.clip_grad_norm is not None:
            check_positive("clip_grad_norm", self.clip_grad_norm)
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            msg = f"betas must be two numbers in [0, 1), got {self.betas}."
            raise InputError(msg)

    def planned_epochs(self, steps_per_epoch: int) -> int:
        """Return the epochs to train: ``epochs``, or fewer where ``max_steps`` are reached before."""
        if self.max_steps is None:
            return self.epochs
        return min(self.epochs, max(1, math.ceil(self.max_steps / max(1, steps_per_epoch))))

    def warmup_steps(self, total: int) -> int:
        """Return the length of the warm-up in steps; it always leaves one step after it."""
        steps = self.warmup if self.warmup >= 1 else self.warmup * total
        return min(round(steps), max(total - 1, 0))

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with other values; a name that is no part of a recipe is refused."""
        known = [f.name for f in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            msg = f"A recipe has no {unknown[0]!r}. {did_you_mean(unknown[0], known)}"
            raise InputError(msg)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe of :meth:`to_dict`."""
        return cls().replace(**values)

    def to_json(self) -> str:
        """Return the recipe as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


#: Preset -> recipe. "paper" holds what the paper states (section 4.1); what it leaves open is ours.
RECIPES: dict[str, Recipe] = {
    "recommended": Recipe(),
    "paper": Recipe(batch_size=512, clip_grad_norm=None, decay_all=True, flips=False),
    "small": Recipe(epochs=30, max_steps=50, batch_size=256, lr=1e-3, gene_dropout=0.2),
    "tiny": Recipe(epochs=20, max_steps=60, batch_size=128, lr=2e-3, gene_dropout=0.2),
    # STORM as its paper states it (40 of 1000 epochs of warm-up); its small sizes and the jitter of stains are ours.
    "storm": Recipe(
        epochs=1000,
        batch_size=1024,
        lr=1e-4,
        weight_decay=0.05,
        weight_decay_end=0.05,
        warmup=0.04,
        layer_decay=0.7,
        crop=0.3,
        stain_jitter=0.1,
    ),
    "storm-small": Recipe(
        epochs=12,
        max_steps=300,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.05,
        weight_decay_end=0.05,
        layer_decay=1.0,
    ),
    # Multi-branch STORM: 200 epochs, 5 of warm-up, as published; no genes set to zero, which would be learned as zeros.
    "storm-multibranch": Recipe(
        epochs=200,
        batch_size=128,
        lr=1e-4,
        min_lr_ratio=0.01,
        weight_decay=0.05,
        weight_decay_end=0.05,
        warmup=0.025,
        flips=False,
    ),
    "storm-multibranch-small": Recipe(
        epochs=20,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.05,
        weight_decay_end=0.05,
        flips=False,
    ),
    # Ours: the teacher's tile stays as it is.
    "distil": Recipe(
        epochs=20,
        batch_size=128,
        lr=1e-4,
        weight_decay=0.0,
        weight_decay_end=0.0,
        changed="spot",
        stain_jitter=0.3,
    ),
    # The baselines as in the code of STimage-1K4M: Adam, constant weight decay, no warm-up.
    "contrastive": Recipe(
        epochs=15,
        batch_size=1024,
        optimizer="adam",
        lr=5e-5,
        warmup=0.0,
        weight_decay=0.2,
        weight_decay_end=0.2,
        betas=(0.9, 0.98),
        eps=1e-6,
        decay_all=True,
        clip_grad_norm=None,
        flips=False,
    ),
}


#: registered names whose recipe does not follow from their size
_OWN = {
    "storm": "storm", "storm-paper": "storm", "storm-base": "storm-small", "storm-small": "storm-small",
    "storm-tiny": "storm-small",
    "storm-multibranch": "storm-multibranch", "squall": "storm-multibranch",
    "storm-multibranch-small": "storm-multibranch-small", "storm-multibranch-base": "storm-multibranch-small",
    "distil": "distil", "distil-tiny": "distil",
    "clip": "contrastive", "plip": "contrastive",
}  # fmt: skip


def recipe_for(model_name: str) -> Recipe:
    """Return the recipe that fits a model by its registered name (its size, or the baselines' own)."""
    name = model_name.lower()
    if name in _OWN:
        return RECIPES[_OWN[name]]
    for size in ("tiny", "small"):
        if name.endswith(f"-{size}"):
            return RECIPES[size]
    return RECIPES["recommended"]


def recipe_of(model: Model) -> Recipe:
    """Return how a model is trained further: as it says, as it was trained, or as fits its size if it never was.

    Precision (that of another device perhaps) and what was adapted are chosen anew.
    """
    if recorded := model.seen.further or model.seen.recipe:
        return Recipe.from_dict(recorded).replace(precision="auto", tune="full")
    return recipe_for(nearest_name(model.config))


def resolve_recipe(recipe: Recipe | str | None, model: str | Model, **overrides: Any) -> Recipe:
    """Return a recipe from a preset's name, a recipe, or the model's default, with the values given changed.

    Parameters
    ----------
    recipe
        A recipe, the name of a preset, or ``None`` for the one that fits the model.
    model
        Registered name of a new model, or the model that is trained further.
    **overrides
        Fields to change; ``None`` leaves a field as it is.

    Returns
    -------
    The recipe to use.
    """
    if recipe is None:
        recipe = recipe_for(model) if isinstance(model, str) else recipe_of(model)
    elif isinstance(recipe, str):
        recipe = RECIPES[check_choice("recipe", recipe, RECIPES)]
    changes = {k: v for k, v in overrides.items() if v is not None}
    if "epochs" in changes and "max_steps" not in changes:
        changes["max_steps"] = None  # who names a number of epochs gets it
    return recipe.replace(**changes)
