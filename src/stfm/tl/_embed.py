"""``tl.embed``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from stfm._errors import StfmWarning
from stfm._keys import EMBEDDING, PARTS, SPATIAL, part_key
from stfm._provenance import record
from stfm._validate import check_choice, check_count, check_key
from stfm.inference.contexts import warn_coarse
from stfm.inference.device import resolve_device
from stfm.inference.features import use_frozen_features
from stfm.inference.stream import embed_slides
from stfm.models.inputs import SlideInputs
from stfm.slide.from_anndata import check_table, target
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata
from stfm.slide.read import as_slides
from stfm.slide.slide import check_counted
from stfm.tl._models import resolve_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stfm.models.base import Model


def embed(
    adata: AnnData,
    model: Model | str | Path | None = None,
    *,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "fp32",
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    cache_features: bool = True,
    key_added: str = EMBEDDING,
    copy: bool = False,
) -> AnnData | None:
    """Embed every spot, by default with the model that ships with stfm.

    Tiles are cut and read while the device computes, so memory does not grow with the number of spots; a backed object
    is read in blocks. A modality that the data lack is left out: the joint embedding then rests on the other one.

    Parameters
    ----------
    adata
        Object with raw counts, H&E, or both; one library or many. Or a SpatialData, whose table is written to.
    model
        A trained model, the folder that ``model.save(folder)`` wrote, or a name of :func:`stfm.weights.list_weights`;
        by default the one that ships with stfm.
    batch_size
        Spots at once; results are the same for any number (to 1e-5 in fp32).
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    precision
        ``"fp32"``, or ``"bf16"`` (faster on GPUs; three digits).
    library_key
        Column of ``obs`` that names the library of a spot; found when there is only one candidate.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    layer
        Layer with raw counts; None takes ``X``.
    image
        H&E where it is neither in ``uns`` nor recorded by :func:`stfm.pp.tile`; or a mapping from library to it.
    mpp
        µm per px of the full-resolution image, where it is not to be found; or a mapping from library to it.
    cache_features
        Whether to keep the features of frozen image encoders on disk, and use those that training left there.
    key_added
        Name of the embedding.
    copy
        Whether to return a new object instead of writing to ``adata``.

    Returns
    -------
    None, or the new object. Written are:

    obsm[key_added]
        The joint embedding, float32 ``(n, d)``. It is that of one model: embeddings of another, or of the same after it
        was trained further (which may widen it), are not to be compared with it.
    obsm[key_added + "_image"], ["_gene"], ["_niche"]
        Its parts in the shared space, float32 ``(n, d)``; a part whose modality is absent is not written, and nan in
        libraries that lack what other libraries have.
    uns[key_added]
        Model, where it came from (``"default@2"``: name and version), hash of the weights; genes matched and
        µm/px of each library; parameters.

    Raises
    ------
    InputError
        The weights are not there, no gene matches, or what the model reads is not there, zero throughout, at one place
        or off the image; the object is untouched.
    DataIntegrityError
        The folder holds a checkpoint of another architecture, or a file of it is damaged.

    Warns
    -----
    StfmWarning
        H&E of a library is so coarse that the model's tile of a spot has fewer than 16 px of it; a library lacks a
        modality that others have.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60)
    >>> model = sf.tl.train(adata, "st-align-tiny", epochs=1)
    >>> sf.tl.embed(adata, model)
    >>> adata.obsm["X_stfm"].shape
    (60, 128)
    """
    if is_spatialdata(adata):
        return on_spatialdata(embed, locals())
    check_key("key_added", key_added, taken=(spatial_key, library_key))
    check_count("batch_size", batch_size)
    check_choice("precision", precision, ("fp32", "bf16"))
    resolve_device(device)
    trained, source = resolve_model(model)
    slides = as_slides(
        check_table(adata), library_key=library_key, spatial_key=spatial_key, layer=layer, image=image, mpp=mpp,
        modalities=_modalities(trained),
    )  # fmt: skip
    check_counted(slides)
    inputs = [SlideInputs(s, trained.inputs, trained.vocabulary, slide_id=i) for i, s in enumerate(slides)]
    warn_coarse(slides, trained.inputs, stacklevel=3)
    if cache_features or "image" in trained.inputs.centre:  # a slide's mean is known once all of its features are
        use_frozen_features(trained, inputs, device=device, precision=precision, cache=cache_features)
    trained.ready(inputs)
    try:
        blocks = embed_slides(trained, inputs, batch_size=batch_size, device=device, precision=precision)
    finally:
        trained.ready([])
    whole = _in_order(blocks, inputs, adata.n_obs)
    params = {
        "batch_size": batch_size, "device": device, "precision": precision, "library_key": library_key,
        "spatial_key": spatial_key, "layer": layer, "key_added": key_added,
    }  # fmt: skip
    description = _describe(trained, source, inputs, params)

    result = target(adata, copy=copy)
    for part in PARTS:
        result.obsm.pop(part_key(key_added, part), None)  # of an earlier model that had the part
        if part in whole:
            result.obsm[part_key(key_added, part)] = whole[part]
    result.obsm[key_added] = whole["joint"]
    result.uns[key_added] = description
    return result if copy else None


def _modalities(model: Model) -> tuple[str, ...]:
    """Return what the model reads, so that the rest is neither read nor checked."""
    spec = model.inputs
    return tuple(name for name, on in (("image", spec.image), ("gene", spec.gene)) if on)


def _in_order(
    blocks: Sequence[dict[str, NDArray[np.float32]]], inputs: Sequence[SlideInputs], n_obs: int
) -> dict[str, NDArray[np.float32]]:
    """Put the embeddings of all libraries in the order of the object; nan where a library lacks a part."""
    widths = {name: values.shape[1] for parts in blocks for name, values in parts.items()}
    whole = {name: np.full((n_obs, width), np.nan, np.float32) for name, width in widths.items()}
    for parts, one in zip(blocks, inputs, strict=True):
        for name, values in parts.items():
            whole[name][one.slide.rows] = values
        if lacking := sorted(set(widths) - set(parts)):
            warnings.warn(
                f"library {one.slide.name!r} lacks a modality that others have: {', '.join(lacking)} is nan there.",
                StfmWarning,
                stacklevel=3,
            )
    return whole


def _describe(model: Model, source: str, inputs: Sequence[SlideInputs], params: Mapping[str, Any]) -> dict[str, Any]:
    """Say how the embedding was made: enough to make it again."""
    matches = [one.match for one in inputs]
    return record(
        {
            "model": model.family,
            "source": source,
            "weights_sha256": model.weights_sha256(),
            "genes_total": 0 if model.vocabulary is None else len(model.vocabulary),
            "libraries": [one.slide.name for one in inputs],
            "genes_matched": [0 if match is None else match.n_matched for match in matches],
            "mpp": [np.nan if one.slide.mpp is None else one.slide.mpp for one in inputs],
            # A number measured on these is no number of generalisation.
            "seen_in_training": [model.seen.has(one.slide) for one in inputs],
            "params": dict(params),
        }
    )
