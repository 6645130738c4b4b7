"""Frozen image features of a spot at several scales, with those of the spots around it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from stfm._errors import InputError, StfmWarning
from stfm._validate import check_count, check_positive
from stfm.inference.features import image_features
from stfm.inference.rings import ring_graphs, ring_means
from stfm.models.inputs import InputSpec, SlideInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from stfm.slide.slide import Slide

__all__ = [
    "COARSE_CONTEXTS_UM",
    "CONTEXTS_UM",
    "FEWEST_PX",
    "context_features",
    "default_contexts",
    "surround",
    "warn_coarse",
]

#: sides of the tiles in µm: cells, a spot with its neighbours, the tissue around
CONTEXTS_UM = (112.0, 224.0, 448.0)
#: the same where a px is as large as a cell (low-resolution Visium images)
COARSE_CONTEXTS_UM = (448.0, 1120.0)
#: px of the image as it is that a tile needs to show cells
FEWEST_PX = 16
_NAMED = 3  # libraries that a warning names


def default_contexts(slides: Sequence[Slide]) -> tuple[float, ...]:
    """Return the tile sizes in µm that the coarsest image among the slides can show.

    Parameters
    ----------
    slides
        Slides that will be compared, so that all get the same sizes.
    """
    coarsest = max((slide.tiles.native_mpp for slide in slides if slide.tiles is not None), default=0.0)
    return CONTEXTS_UM if CONTEXTS_UM[0] / max(coarsest, 1e-9) >= FEWEST_PX else COARSE_CONTEXTS_UM


def warn_coarse(slides: Sequence[Slide], spec: InputSpec, *, stacklevel: int) -> None:
    """Warn, once for all slides, of H&E with too few px for the smallest tile that a model reads of a spot.

    Only sizes that the model itself states count: a tile of a bin's or a cell's own size has few px of any image.

    Parameters
    ----------
    slides
        Slides that are read; those without H&E are passed over.
    spec
        What the model reads.
    stacklevel
        As of :func:`warnings.warn`, where the caller of this function is 2.
    """
    sizes = spec.contexts_um or (() if spec.spot_um is None else (spec.spot_um,))
    if spec.spot_px is None or not sizes:
        return
    size, fewest = min(sizes), min(FEWEST_PX, spec.spot_px)  # a tile shown at fewer px needs no more
    scales = {slide.name: slide.tiles.native_mpp for slide in slides if slide.tiles is not None}
    coarse = [
        f"library {name!r} ({mpp:.3g} µm/px, {size / mpp:.3g} px a tile)"
        for name, mpp in scales.items()
        if size / mpp < fewest
    ]
    if coarse:
        more = f" and {len(coarse) - _NAMED} more" if len(coarse) > _NAMED else ""
        msg = (
            f"The model reads tiles of {size:g} µm, and the H&E is too coarse to show cells in them: "
            f"{', '.join(coarse[:_NAMED])}{more}; give the full-resolution image with image=."
        )
        warnings.warn(msg, StfmWarning, stacklevel=stacklevel)


def context_features(
    slide: Slide,
    encoder: torch.nn.Module,
    *,
    contexts_um: Sequence[float] = CONTEXTS_UM,
    rings: int = 2,
    tile_px: int = 224,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    cache: bool = True,
) -> NDArray[np.float32]:
    """Return the features of every spot at several tile sizes, beside their means over rings of neighbours.

    Parameters
    ----------
    slide
        Slide with H&E.
    encoder
        Frozen image encoder: uint8 tiles ``(b, 3, h, w)`` -> ``(b, f)``.
    contexts_um
        Sides of the tiles in µm.
    rings
        Rings of neighbours whose means are appended; 0 for none.
    tile_px
        Side in px at which every tile is shown to the encoder.
    batch_size
        Tiles at once.
    device
        See :func:`~stfm.inference.device.resolve_device`.
    precision
        ``"fp32"`` or ``"bf16"``.
    cache
        Whether features are kept on disk; their key holds image, tiling, encoder and weights.

    Returns
    -------
    float32 ``(n, f * len(contexts_um) * (1 + rings))``.

    Raises
    ------
    InputError
        The slide has no image or its µm/px is unknown.
    """
    check_count("rings", rings, minimum=0)
    if not len(contexts_um):
        msg = "contexts_um is empty; give at least one tile size in µm."
        raise InputError(msg)
    if slide.tiles is None:
        msg = f"slide {slide.name!r} has no H&E; give it with image=, or record it with sf.pp.tile."
        raise InputError(msg)
    parts = []
    for side in contexts_um:
        check_positive("contexts_um", side)
        spec = InputSpec(spot_px=tile_px, spot_um=float(side), niche_px=None, counts=False, niche_counts=False)
        inputs = SlideInputs(slide, spec, None)
        parts.append(
            image_features(
                inputs, encoder, "spot", batch_size=batch_size, device=device, precision=precision, cache=cache
            )
        )
    return surround(np.concatenate(parts, axis=1), slide.coords, rings)


def surround(features: NDArray[np.float32], coords: NDArray[np.float64], rings: int) -> NDArray[np.float32]:
    """Append to the features of each spot their means over ring 1, ring 2 … of its neighbours.

    Parameters
    ----------
    features
        float32 ``(n, f)``.
    coords
        Coordinates of the spots of one slide, any unit.
    rings
        Number of rings; 0 returns the features as they are.

    Returns
    -------
    float32 ``(n, f * (1 + rings))``.
    """
    if rings == 0:
        return features
    graphs = ring_graphs(coords, rings)
    return np.concatenate([features, *(ring_means(features, graph) for graph in graphs)], axis=1)
