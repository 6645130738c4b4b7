"""Configuration of STORM: what its paper states, what it leaves open as named choices, and sizes for two cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, check_range
from stfm.models._slots import EncoderChoice, as_choice
from stfm.nn.counts import LIKELIHOODS

STAGES = ("mask", "align")
JOINTS = ("field", "concat", "mean")
SLIDE_NORMS = ("none", "centre", "standardise")
#: rows of the ablation table
ABLATIONS = ("full", "no-neighbours", "no-image", "no-gene", "no-distance", "shared-experts")


@dataclass(frozen=True)
class STORMConfig:
    """Configuration of STORM.

    Parameters
    ----------
    image
        Encoder of H&E tiles; :class:`EncoderChoice` says how it is used (frozen, LoRA, full).
    gene
        Encoder of counts; None reads them through the gene table, from any panel.
    spot_px, contexts_um
        Side of a tile in px, and sides in µm of the tiles around a spot; one of 112 µm in the paper.
    slide_norm
        What is taken out of a slide's frozen image features, against shifts of stain: ``"none"``, its mean
        (``"centre"``), or mean and deviation (``"standardise"``).
    feature_components
        Principal components of frozen image features that are kept; 0 keeps the features as they are.
    feature_dropout
        Share of these that are dropped in training.
    window
        Spots in a window: 25 is 5 x 5 on a lattice, the 25 nearest elsewhere.
    width, depth, heads, mlp_ratio, dropout, drop_path
        Of the spatial level.
    shared_experts
        One feed-forward for both modalities instead of one each.
    distance_bias, distance_unit_um, learn_slopes
        ALiBi on µm: whether it is used, the distance that counts as one step, whether its slopes are learned.
    gene_width
        Length of a gene's embedding.
    within_slides
        Whether the gene table starts from differences within slides alone, which slides of several tissues need: what
        sets a cortex apart from a tumour would take the place of what sets its layers apart.
    likelihood
        Of expression: ``"nb"``, ``"poisson"`` (on counts) or ``"gaussian"`` (on log-normalised values).
    n_visible
        Spots of a window that stay visible, in each modality by itself.
    cross_share
        Share of the windows that show all of H&E and the counts of any number of spots instead, as prediction from H&E
        and in the context of measured spots does; 0 is the paper's masking.
    max_genes
        Genes drawn for the expression loss of a step; all where there are fewer.
    decoder_depth
        Blocks of each decoder.
    image_weight, gene_weight
        Weights of the two likelihoods.
    temperature
        Of the alignment, at its start.
    replay
        Weight of the masked losses during alignment, so that the decoders do not drift; 0 aligns alone.
    linear_blend
        Share of a closed-form reduced-rank regression on the window's image features in what is predicted from H&E; 0
        leaves it out. It needs a frozen image encoder and is left out with a trained one.
    joint
        The joint embedding: both tokens of the spot after the spatial level side by side (``"concat"``) or their
        ``"mean"``; or ``"field"``: the latent expression that the window shares, each component averaged as far as it
        reaches (:class:`~stfm.models._storm_field.LatentField`), written by the decoder where nothing was measured.
    own_field
        Whether the reach of each component (``joint="field"``) is seen on the slide itself, too, so that an embedding
        depends on its slide; off takes that of the training slides.
    slide_components
        Components (``joint="field"``) that a trained model gets of the slides that it goes on with, beside its own
        (:class:`~stfm.models._storm_components.SlideComponents`); 0 gives it none.
    ablation
        ``"full"``; ``"no-neighbours"``: windows of one spot; ``"no-image"``, ``"no-gene"``: one modality;
        ``"no-distance"``: no distance bias; ``"shared-experts"``.
    min_fraction
        Smallest share of the vocabulary that a slide must have measured; small, since any panel may be read.
    """

    image: EncoderChoice | None = field(default_factory=lambda: EncoderChoice("h0-mini"))
    gene: EncoderChoice | None = None
    spot_px: int = 224
    contexts_um: tuple[float, ...] = (112.0,)
    slide_norm: str = "none"
    feature_components: int = 0
    feature_dropout: float = 0.0
    window: int = 25
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.1
    shared_experts: bool = False
    distance_bias: bool = True
    distance_unit_um: float = 100.0
    learn_slopes: bool = False
    gene_width: int = 64
    within_slides: bool = False
    likelihood: str = "nb"
    n_visible: int = 5
    cross_share: float = 0.5
    max_genes: int = 2048
    decoder_depth: int = 2
    image_weight: float = 1.0
    gene_weight: float = 1.0
    temperature: float = 0.07
    replay: float = 1.0
    linear_blend: float = 0.0
    joint: str = "concat"
    own_field: bool = False
    slide_components: int = 0
    ablation: str = "full"
    min_fraction: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", as_choice("image", self.image, "image"))
        object.__setattr__(self, "gene", as_choice("gene", self.gene, "gene"))
        object.__setattr__(self, "contexts_um", tuple(float(c) for c in self.contexts_um))
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        check_choice("slide_norm", self.slide_norm, SLIDE_NORMS)
        check_choice("joint", self.joint, JOINTS)
        check_choice("ablation", self.ablation, ABLATIONS)
        for name in ("spot_px", "window", "width", "depth", "heads", "gene_width", "max_genes"):
            check_count(name, getattr(self, name))
        for name in ("decoder_depth", "feature_components", "n_visible", "slide_components"):
            check_count(name, getattr(self, name), minimum=0)
        for name in ("feature_dropout", "dropout", "drop_path", "cross_share", "linear_blend", "min_fraction"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("image_weight", "gene_weight", "replay"):
            check_range(name, getattr(self, name), 0.0, float("inf"))
        for name in ("temperature", "distance_unit_um", "mlp_ratio"):
            check_positive(name, getattr(self, name))
        if not self.contexts_um:
            msg = "contexts_um is empty; give at least one tile size in µm."
            raise InputError(msg)
        if self.width % self.heads:
            msg = f"width must be a multiple of heads, got {self.width} and {self.heads}."
            raise InputError(msg)
        if self.image is None and self.ablation == "no-gene":
            msg = "STORM needs one modality at least: image=None and ablation='no-gene' leave none."
            raise InputError(msg)
        if self.n_visible >= self.window_size and self.cross_share == 0:
            msg = (
                f"n_visible={self.n_visible} of windows of {self.window_size} with cross_share=0 hides nothing; "
                "show fewer, or set cross_share above 0."
            )
            raise InputError(msg)
        if self.n_visible == 0 and self.cross_share < 1:
            msg = "n_visible=0 hides everything; show at least one spot of a window, or set cross_share=1."
            raise InputError(msg)

    @property
    def window_size(self) -> int:
        """Spots in a window, the ablation carried out."""
        return 1 if self.ablation == "no-neighbours" else self.window

    @property
    def reads_image(self) -> bool:
        """Whether H&E is read."""
        return self.image is not None and self.ablation != "no-image"

    @property
    def reads_gene(self) -> bool:
        """Whether counts are read (they are predicted in any case)."""
        return self.ablation != "no-gene"

    @classmethod
    def preset(cls, name: str = "recommended") -> STORMConfig:
        """Return a configuration by name.

        Parameters
        ----------
        name
            ``"recommended"``: the paper's towers and a spatial level of a ViT-B's size; ``"paper"``: its masking to
            the letter; ``"base"``: the size that stfm pretrains; ``"small"``, ``"tiny"``: light towers that train on
            two cores.
        """
        check_choice("preset", name, PRESETS)
        return cls(**PRESETS[name])


#: What was measured to help models that are trained from scratch on a few slides (docs/decisions.md).
_LIGHT: dict[str, Any] = {
    "joint": "field",
    "image": EncoderChoice("handcrafted"),
    "contexts_um": (112.0, 224.0, 448.0),
    "slide_norm": "standardise",
    "feature_components": 256,
    "feature_dropout": 0.3,
    "dropout": 0.1,
    "drop_path": 0.0,
    "mlp_ratio": 2.0,
    "linear_blend": 0.5,
    "likelihood": "gaussian",
    "decoder_depth": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": {"cross_share": 0.0},
    "small": {**_LIGHT, "width": 96, "depth": 2, "heads": 4, "gene_width": 32, "spot_px": 112},
    "base": {
        **_LIGHT, "image": EncoderChoice("stfm-tower", weights="default"), "spot_px": 112, "width": 128, "depth": 2,
        "heads": 4, "gene_width": 64, "within_slides": True, "own_field": True, "slide_components": 16,
    },
    "tiny": {
        **_LIGHT, "width": 48, "depth": 1, "heads": 4, "gene_width": 16, "spot_px": 56,
        "feature_components": 64, "contexts_um": (224.0,),
    },
}  # fmt: skip
