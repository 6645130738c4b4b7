"""Configuration of the multi-branch STORM (SQUALL), and the sizes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stfm._errors import InputError
from stfm._validate import check_choice, check_count, check_positive, check_range
from stfm.slide.platforms import get_platform

EXPRESSIONS = ("spots", "bins")
DECODERS = ("self", "cross")
STANDARDISE = ("zscore", "none")
PIXELS = ("standard", "unit")
MODES = ("full", "lora", "head")
STAGES = ("mask", "align", "both")

#: Platform -> side of the tile and diameter of what is measured, in µm. A tile holds the tissue that a spot sees and
#: some around it: a pitch of spots, a few cells of what is finer. A patch of 16 of 112 px is 32, 16 or 8 µm wide.
RESOLUTION: dict[str, tuple[float, float]] = {
    "ST": (224.0, 100.0),
    "ST 2k": (224.0, 100.0),
    "Visium": (112.0, 55.0),
    "Visium HD 2": (112.0, 2.0),
    "Visium HD 8": (56.0, 8.0),
    "Visium HD 16": (112.0, 16.0),
    "Xenium": (56.0, 10.0),
    "CosMx": (56.0, 10.0),
    "MERSCOPE": (56.0, 10.0),
}


@dataclass(frozen=True)
class StormMultiBranchConfig:
    """Configuration of the multi-branch STORM; the defaults are the published size.

    Parameters
    ----------
    tile_px, patch_px
        Sides of a tile and of an image patch, in px.
    platform
        Platform (or an alias of it) whose resolution the tiles have, ``RESOLUTION``.
    tile_um, spot_um
        Side of a tile and diameter of what is measured in it, in µm, where they should not be the platform's. Tiles of
        any slide are read at this size, so one model reads all platforms; places are in µm.
    expression
        ``"spots"``: a token for each spot in the tile, at its place. ``"bins"``: an image of bins, cut into as many
        patches as the H&E.
    n_bins
        Bins along the side of a tile, with ``expression="bins"``.
    window
        Spots, bins or cells that are read with each one, the nearest; those that lie in its tile are shown there. None
        reads a spot alone, and with ``expression="bins"`` as many as a tile has bins.
    gene_width
        Numbers that the genes of a spot or bin are first mapped to.
    width, depth, specific, heads, mlp_ratio
        Width of a token; blocks of the encoder, and how many of them (the first) have a feed-forward for each modality;
        heads; width of a feed-forward over that of a token.
    drop_path
        Stochastic depth of the last block; it grows linearly from the first.
    bias_hidden
        Layer between of the relative bias.
    decoder, decoder_depth
        ``"self"``: self-attention over what was encoded, as the public code; ``"cross"``: queries at all places look at
        it, as the overview says. Blocks of each of the two decoders.
    mask_ratio
        Share of the places that show expression; the others show the image.
    gene_weight, pixel_weight, contrastive_weight, matching_weight
        Of the losses; 0 leaves one out.
    hidden_genes
        Share of the genes that is also hidden where expression is shown, and predicted there, so that the model can
        denoise and fill in genes; 0, as published, learns neither.
    replay
        Weight of the losses of stage ``"mask"`` within stage ``"align"``, so that the decoders keep up with the
        encoder; 0, as published, leaves them as they are.
    inter, intra
        Contrast the samples at each place; the places of each sample.
    temperature
        Of contrast and matching.
    standardise
        Genes in and out: ``"zscore"`` with the training slides' statistics, or ``"none"``.
    pixels
        ``"unit"``: 0 to 1; ``"standard"``: by mean and deviation of each channel in the training tiles.
    legacy_reshape
        Un-patchify as the published code does, for its weights.
    checkpointing
        Compute blocks again in the backward pass: less memory, a third more time.
    mode, lora_rank, lora_alpha
        What is trained: ``"full"``; ``"lora"``: low-rank additions to the maps to queries and values of the encoder,
        and the decoders; ``"head"``: the decoders.
    min_fraction
        Smallest share of the vocabulary that a slide must have measured.
    """

    tile_px: int = 224
    patch_px: int = 16
    platform: str = "Visium HD 2"
    tile_um: float | None = None
    spot_um: float | None = None
    expression: str = "bins"
    n_bins: int = 56
    window: int | None = None
    gene_width: int = 256
    width: int = 1024
    depth: int = 24
    specific: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    bias_hidden: int = 64
    decoder: str = "self"
    decoder_depth: int = 4
    mask_ratio: float = 0.5
    gene_weight: float = 1.0
    pixel_weight: float = 1.0
    contrastive_weight: float = 1.0
    matching_weight: float = 1.0
    hidden_genes: float = 0.0
    replay: float = 0.0
    inter: bool = True
    intra: bool = True
    temperature: float = 0.1
    standardise: str = "none"
    pixels: str = "unit"
    legacy_reshape: bool = False
    checkpointing: bool = False
    mode: str = "full"
    lora_rank: int = 4
    lora_alpha: float = 8.0
    min_fraction: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "platform", get_platform(self.platform).name)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        if self.window is not None:
            check_count("window", self.window)
        for name in ("tile_um", "spot_um", "mlp_ratio", "temperature", "lora_alpha"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("gene_weight", "pixel_weight", "contrastive_weight", "matching_weight", "replay"):
            check_range(name, getattr(self, name), 0.0, float("inf"))
        check_range("mask_ratio", self.mask_ratio, 0.0, 1.0)
        check_range("hidden_genes", self.hidden_genes, 0.0, 0.9)
        check_range("drop_path", self.drop_path, 0.0, 0.99)
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.tile_px % self.patch_px:
            msg = f"tile_px must be a multiple of patch_px, got {self.tile_px} and {self.patch_px}."
            raise InputError(msg)
        if self.platform not in RESOLUTION and None in (self.tile_um, self.spot_um):
            msg = f"no tile is set for platform {self.platform!r} ({', '.join(RESOLUTION)}); give tile_um and spot_um."
            raise InputError(msg)
        if self.width % self.heads:
            msg = f"width must be a multiple of heads, got {self.width} and {self.heads}."
            raise InputError(msg)
        if not 0 <= self.specific <= self.depth:
            msg = f"specific must lie between 0 and depth, got {self.specific} and {self.depth}."
            raise InputError(msg)
        if self.expression == "bins" and self.n_bins % self.side:
            msg = f"n_bins must be a multiple of the patches along a side, got {self.n_bins} and {self.side}."
            raise InputError(msg)
        if self.contrastive_weight > 0 and not (self.inter or self.intra):
            msg = (
                "contrastive_weight is above 0, but inter and intra are both off; turn one on, or set the weight to 0."
            )
            raise InputError(msg)

    @property
    def extent_um(self) -> float:
        """Side of the tile in µm."""
        return RESOLUTION[self.platform][0] if self.tile_um is None else self.tile_um

    @property
    def site_um(self) -> float:
        """Diameter in µm of what is measured."""
        return RESOLUTION[self.platform][1] if self.spot_um is None else self.spot_um

    @property
    def n_sites(self) -> int:
        """Spots, bins or cells that are read with each one, itself included."""
        return self.window or (self.n_bins**2 if self.expression == "bins" else 1)

    @property
    def side(self) -> int:
        """Image patches along a side of the tile."""
        return self.tile_px // self.patch_px

    @property
    def cells(self) -> int:
        """Bins along a side of a patch; 1 where expression is a token a spot."""
        return self.n_bins // self.side if self.expression == "bins" else 1

    @classmethod
    def preset(cls, name: str) -> StormMultiBranchConfig:
        """Return the configuration of a size: ``"published"``, ``"base"`` or ``"small"``."""
        return cls(**PRESETS[check_choice("preset", name, PRESETS)])


_CHOICES = {
    "expression": EXPRESSIONS,
    "decoder": DECODERS,
    "standardise": STANDARDISE,
    "pixels": PIXELS,
    "mode": MODES,
}
_COUNTS = (
    "tile_px", "patch_px", "n_bins", "gene_width", "width", "depth", "heads", "bias_hidden", "decoder_depth",
    "lora_rank",
)  # fmt: skip

_SPOTS: dict[str, Any] = {
    "tile_px": 112,
    "platform": "Visium",
    "expression": "spots",
    "standardise": "zscore",
    "pixels": "standard",
    "hidden_genes": 0.3,
    "replay": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "base": {**_SPOTS, "width": 384, "depth": 12, "specific": 8, "heads": 6, "decoder_depth": 2},
    "small": {
        **_SPOTS,
        "patch_px": 28,
        "width": 128,
        "depth": 6,
        "specific": 4,
        "heads": 4,
        "gene_width": 128,
        "bias_hidden": 32,
        "decoder_depth": 1,
        "drop_path": 0.05,
    },
}
