"""Configuration of ST-Align: every ambiguity of the paper is a field, the recommended value first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, check_range
from stfm.models._slots import EncoderChoice, as_choice
from stfm.nn.fusion import MISSING, RESIDUALS, SCALES, SOFTMAXES
from stfm.nn.heads import NORMS, PROJECTIONS
from stfm.nn.losses import DENOMINATORS, NEGATIVES, check_weights

FUSIONS = ("abfn", "concat", "linear")
JOINTS = ("spot", "niche", "concat")
PARTS = ("concat", "spot")
#: rows of Table 2 of the paper and single levels
ABLATIONS = ("full", "no-ns", "no-ae", "concat", "no-abfn", "spot", "niche")
SLOTS = {"spot_image": "image", "niche_image": "image", "spot_gene": "gene", "niche_gene": "gene"}


@dataclass(frozen=True)
class STAlignConfig:
    """Configuration of ST-Align; numbers in brackets are rows of the docs' table of open choices.

    Parameters
    ----------
    spot_image, niche_image, spot_gene, niche_gene
        Encoders of the four slots, by name or :class:`EncoderChoice` (mode frozen, LoRA or full: 21); None leaves a
        slot empty. A level (spot, niche) has both its encoders or none.
    width, n_tokens
        d and s; a token has width ``l = d / s`` (7).
    spot_px, niche_px, spot_um, niche_um
        Sides of the tiles in px, and in µm where they should not be the slide's own (15, 17).
    n_neighbors, include_self, ties
        The niche, where a slide brings no table of its own (12, 13).
    centre
        Subtract each slide's mean from its log counts and frozen image features, which takes out shifts of batch and
        stain; the embedding of a spot then depends on the slide it lies on.
    projection, projection_norm, projection_dropout, projection_layer_norm
        From an encoder's features to d (7): ``"linear"``, ``"mlp"``, ``"none"``; features put on one scale first by
        ``"batch"`` norm, ``"layer"`` norm or not at all; layer norm of the result.
    fusion
        ``"abfn"``; ``"concat"``: both vectors side by side, of equal length, nothing learned; ``"linear"``: the same
        and a linear map to d.
    attention_scale, attention_softmax, share_directions, share_levels, residual
        Of the ABFN: scores over ``sqrt(l)`` or ``sqrt(d)`` (9); softmax over the tokens of the same spot or, as
        printed, over the batch (8); one set of matrices for both directions, for both levels (10); what keeps the
        inputs in the fused vector (:class:`~stfm.nn.fusion.ABFN`).
    missing, modality_dropout
        What stands in for an absent modality, ``"self"`` (the other one) or ``"token"`` (learned); share of the spots
        that lose one modality before fusion in training.
    denominator
        ``"all"`` (InfoNCE) or ``"negatives"``, as eqs. 10 and 11 are printed (1).
    symmetric_ns
        Both directions in eq. 11 (3).
    normalise
        Compare by cosine instead of dot product (4).
    temperature, learn_temperature, temperature_per_loss
        τ at the start; learned (clamped) or fixed; one for all three losses or one each (5).
    lambda1, lambda2
        Weights of eq. 12; the rest is that of L_NS (6).
    negatives, mask_overlap
        Negatives from the ``"batch"`` or the same ``"slide"``; leave out those whose niche shares a spot with the
        query's.
    joint
        Which fused vector is the embedding: of the ``"spot"``, the ``"niche"``, or both (``"concat"``) (30).
    parts
        The image and gene parts of the embedding: both levels side by side (``"concat"``) or the ``"spot"``'s.
    ablation
        ``"full"``; ``"no-ns"``: without L_NS (the fusion then gets no gradient and stays at random);
        ``"no-ae"``: the adaptive encoders replaced by the frozen ones of the other level; ``"concat"``: as ``"no-ae"``
        with concatenation for ABFN; ``"no-abfn"``: concatenation alone; ``"spot"``, ``"niche"``: one level only.
    min_fraction
        Smallest share of the vocabulary that a slide must have measured.
    """

    spot_image: EncoderChoice | None = field(default_factory=lambda: EncoderChoice("ae-img"))
    niche_image: EncoderChoice | None = field(default_factory=lambda: EncoderChoice("uni"))
    spot_gene: EncoderChoice | None = field(default_factory=lambda: EncoderChoice("scgpt"))
    niche_gene: EncoderChoice | None = field(default_factory=lambda: EncoderChoice("ae-gene"))
    width: int = 512
    n_tokens: int = 8
    spot_px: int = 28
    niche_px: int = 224
    spot_um: float | None = None
    niche_um: float | None = None
    n_neighbors: int = 3
    include_self: bool = False
    ties: str = "index"
    centre: bool = False
    projection: str = "linear"
    projection_norm: str = "batch"
    projection_dropout: float = 0.0
    projection_layer_norm: bool = True
    fusion: str = "abfn"
    attention_scale: str = "l"
    attention_softmax: str = "spot"
    share_directions: bool = False
    share_levels: bool = False
    residual: str = "gene"
    missing: str = "self"
    modality_dropout: float = 0.0
    denominator: str = "all"
    symmetric_ns: bool = False
    normalise: bool = True
    temperature: float = 0.07
    learn_temperature: bool = True
    temperature_per_loss: bool = False
    lambda1: float = 1 / 3
    lambda2: float = 1 / 3
    negatives: str = "batch"
    mask_overlap: bool = False
    joint: str = "spot"
    parts: str = "concat"
    ablation: str = "full"
    min_fraction: float = 0.2

    def __post_init__(self) -> None:
        for slot, modality in SLOTS.items():
            object.__setattr__(self, slot, as_choice(slot, getattr(self, slot), modality))
        for name, choices in (
            ("projection", PROJECTIONS), ("projection_norm", NORMS), ("fusion", FUSIONS), ("attention_scale", SCALES),
            ("attention_softmax", SOFTMAXES), ("missing", MISSING), ("residual", RESIDUALS),
            ("denominator", DENOMINATORS),
            ("negatives", NEGATIVES), ("joint", JOINTS), ("parts", PARTS), ("ablation", ABLATIONS),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        for name in ("width", "n_tokens", "spot_px", "niche_px", "n_neighbors"):
            check_count(name, getattr(self, name))
        check_positive("temperature", self.temperature)
        check_range("modality_dropout", self.modality_dropout, 0.0, 1.0)
        check_weights(self.lambda1, self.lambda2)
        for level in ("spot", "niche"):
            pair = (getattr(self, f"{level}_image"), getattr(self, f"{level}_gene"))
            if (pair[0] is None) != (pair[1] is None):
                msg = f"Level {level!r} needs an image and a gene encoder, or neither; got {pair}."
                raise InputError(msg)
        if self.spot_image is None and self.niche_image is None:
            msg = "ST-Align needs encoders at one level at least."
            raise InputError(msg)

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that have encoders."""
        return tuple(level for level in ("spot", "niche") if getattr(self, f"{level}_image") is not None)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the three losses (eq. 12); those of a level that is not there are 0, the rest sum to 1."""
        weights = {
            "spot": self.lambda1,
            "niche": self.lambda2,
            "spot_niche": max(0.0, 1.0 - self.lambda1 - self.lambda2),
        }
        if self.levels != ("spot", "niche"):
            return {name: float((name,) == self.levels) for name in weights}
        return weights

    def resolved(self) -> STAlignConfig:
        """Return the configuration with the ablation carried out."""
        changes: dict[str, Any] = {}
        if self.ablation == "no-ns":
            changes = {"lambda1": 0.5, "lambda2": 0.5}
        elif self.ablation in ("no-ae", "concat"):
            changes = {"spot_image": self.niche_image, "niche_gene": self.spot_gene}
        elif self.ablation in ("spot", "niche"):
            other = "niche" if self.ablation == "spot" else "spot"
            changes = {f"{other}_image": None, f"{other}_gene": None, "joint": self.ablation}
        if self.ablation in ("concat", "no-abfn"):
            changes["fusion"] = "concat"
        return replace(self, ablation="full", **changes)

    @classmethod
    def preset(cls, name: str = "recommended") -> STAlignConfig:
        """Return a configuration by name.

        Parameters
        ----------
        name
            ``"recommended"``: the paper's sizes, sound choices where it is open; ``"paper"``: literally as printed;
            ``"small"``, ``"tiny"``: light encoders that train on two cores.
        """
        check_choice("preset", name, PRESETS)
        return cls(**PRESETS[name])


#: What was measured to help models that are trained from scratch on a few slides (docs/decisions.md).
LIGHT: dict[str, Any] = {
    "n_neighbors": 6,
    "centre": True,
    "projection_dropout": 0.2,
    "modality_dropout": 0.3,
    "temperature": 0.1,
    "temperature_per_loss": True,
    "lambda1": 0.15,
    "lambda2": 0.15,
    "joint": "concat",
}

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": {
        "projection_norm": "none",
        "attention_scale": "d",
        "attention_softmax": "batch",
        "share_directions": True,
        "projection_layer_norm": False,
        "residual": "none",
        "denominator": "negatives",
        "normalise": False,
        "learn_temperature": False,
        "parts": "spot",
        "niche_gene": EncoderChoice("ae-gene", options={"norm_first": False, "standardise": "none"}),
        "niche_image": EncoderChoice("uni", on_mpp="ignore"),  # niches resized to 224 px, whatever their µm/px
    },
    "small": {
        "spot_image": EncoderChoice("cnn-tiny", options={"widths": [16, 32, 64]}),
        "niche_image": EncoderChoice("handcrafted"),
        "spot_gene": EncoderChoice("pca", options={"width": 50}),
        "niche_gene": EncoderChoice("ae-gene-small"),
        "width": 128,
        "n_tokens": 8,
        "niche_px": 112,
        **LIGHT,
    },
    "tiny": {
        "spot_image": EncoderChoice("cnn-tiny", options={"widths": [8, 16, 32]}),
        "niche_image": EncoderChoice("handcrafted"),
        "spot_gene": EncoderChoice("pca", options={"width": 32}),
        "niche_gene": EncoderChoice("gene-mlp", options={"width": 64, "hidden": [64]}),
        "width": 64,
        "n_tokens": 4,
        "niche_px": 56,
        **LIGHT,
    },
}
