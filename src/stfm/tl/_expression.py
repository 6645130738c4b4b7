"""Expression predicted from H&E alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stfm._errors import InputError, StfmWarning, WrongTypeError
from stfm._keys import PREDICTED, SPATIAL, deviation_key
from stfm._provenance import record
from stfm._validate import check_choice, check_key
from stfm.inference.expression import METHODS, RANKS, ExpressionPredictor
from stfm.inference.expression_slides import SlideFeatures, fit_on_slides, predict_slide
from stfm.inference.predict import nearest_genes
from stfm.models.base import WEIGHTS_FILE
from stfm.models.base import Model as ModelClass
from stfm.slide.from_spatialdata import is_spatialdata, on_spatialdata
from stfm.slide.read import as_slides
from stfm.tl._models import resolve_model
from stfm.tl._seen import exposure
from stfm.tl._written import SCALE, describe_written, measured_spots, write_expression
from stfm.weights.registry import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stfm.encoders.base import ImageEncoder
    from stfm.models.base import Model
    from stfm.slide.slide import Slide
    from stfm.tl._seen import Exposure

__all__ = ["fit_expression", "predict_expression"]


def predict_expression(
    adata: AnnData,
    *,
    reference: Any = None,
    model: ExpressionPredictor | Model | str | Path | None = None,
    genes: str | Sequence[str] | None = None,
    measured_key: str | None = None,
    method: Literal["ridge", "mlp"] = "ridge",
    rule: Literal["best", "one_se"] = "best",
    features: str | ImageEncoder | Model = "handcrafted",
    weights: str | Path | None = None,
    contexts_um: Sequence[float] | None = None,
    rings: int = 2,
    tile_px: int = 224,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    cache: bool = True,
    key_added: str = PREDICTED,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Predict expression from H&E alone.

    Either a predictor is fitted on a ``reference`` (slides with H&E and counts), or one that was fitted before
    (:func:`stfm.tl.fit_expression`) is given as ``model``, or a trained model that writes expression by itself
    (``storm``). The counts of ``adata``, if it has any, are not looked at, but for spots that ``measured_key`` names.

    Parameters
    ----------
    adata
        Object with H&E: in ``uns["spatial"]``, recorded by :func:`stfm.pp.tile`, or given as ``image``. Or a
        SpatialData, whose table is written to.
    reference
        AnnData, path, slide, or a list of these, with H&E and raw counts. Give two sections or more: penalty and rank
        are then chosen by leaving out one after the other; of a single one, blocks are left out.
    model
        A fitted predictor, a trained model that writes expression, the folder that its ``save`` wrote, or the name of
        its weights (``"default"``).
    genes
        Genes to predict: names, or a gene set of the protocols, ``"hvg250"`` (the 250 of highest variance on the
        reference; the default), ``"hvg50"``, ``"hmg250"``. With ``model``: some of its genes; by default all, or
        of a model that writes expression those that training had beside H&E (these by Ensembl id too, if it has them).
    measured_key
        Column of ``obs``, True for the spots whose counts may be used for the others (in-context prediction); only of a
        model that writes expression.
    method
        ``"ridge"``, or ``"mlp"``: the paper's MLP on frozen features, here as a correction of ridge whose epochs are
        chosen on held-out sections.
    rule
        ``"best"`` takes the penalty with the best mean r on held-out sections of the reference; ``"one_se"`` the
        largest within one standard error of it: less good on the same patient, better on another.
    features
        Where the image features come from: an image encoder by name (:func:`stfm.encoders.list_encoders`) or as a
        module, shown tiles of several sizes; or a trained model: its image and niche parts, and what its frozen image
        encoders saw. Of a fitted predictor that was built on an encoder or model that no name gives back, the same must
        be given again.
    weights
        Checkpoint of an encoder given by name.
    contexts_um
        Sides of the tiles in µm; by default 112, 224 and 448, or 448 and 1120 where the image is too coarse.
    rings
        Rings of neighbouring spots whose mean features are appended.
    tile_px
        Side in px at which tiles are shown to an encoder; smaller is faster.
    library_key
        Column of ``obs`` that names the library of a spot, in ``adata`` and in the reference.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    layer
        Layer of the reference with raw counts; None takes ``X``.
    image
        H&E of ``adata``; or a mapping from library to it, which may name libraries of the reference too.
    mpp
        µm per px of the full-resolution image of ``adata``; or a mapping from library to it, as ``image``.
    batch_size
        Tiles at once.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    cache
        Whether features are kept on disk for the next time.
    key_added
        Name of the result.
    rng
        Seed or generator; used by ``"mlp"``.
    copy
        Whether to return a new object instead of writing to ``adata``.

    Returns
    -------
    None, or with ``copy=True`` the new object. Written are
    ``obsm[key_added]`` (DataFrame ``(n, g)`` float32, a column a gene, ``log1p(1e4 c / sum c)``, not clipped),
    of a model that writes expression ``obsm[key_added + "_sd"]`` (the same shape: the deviation expected of a measured
    value, of the size of the errors on the slides that training held out, or without any on left-out sections), and
    ``uns[key_added]`` (scale, how the predictor was fitted, what it saw; ``libraries`` and, a bool for each of them,
    ``seen_in_training`` and ``patient_seen_in_training``; of a model that writes expression ``extrapolated``, the genes
    that no training slide had beside H&E).

    Raises
    ------
    InputError
        Neither or both of ``reference`` and ``model``, no H&E, unknown µm/px, genes that are not there, features that
        the predictor was not fitted on.
    MissingKeyError
        No such encoder, column or folder.

    Warns
    -----
    StfmWarning
        ``adata`` has counts, and a slide or patient of it was among those that the predictor, or the model behind its
        features, was fitted on: a correlation with these counts is no test. A gene that was asked for by name was
        measured on no training slide with H&E. The H&E is too coarse for what the model reads.

    Examples
    --------
    >>> import stfm as sf
    >>> adata = sf.datasets.toy(n_spots=60, n_patients=2, mpp=4.0)
    >>> known = adata[adata.obs["patient"] == "patient_1"].copy()
    >>> new = adata[adata.obs["patient"] == "patient_2"].copy()
    >>> sf.tl.predict_expression(new, reference=known, genes=["ERBB2", "MUC1"], rings=0, tile_px=64)
    >>> new.obsm["predicted_expression"].shape
    (60, 2)
    """
    if is_spatialdata(adata):
        return on_spatialdata(predict_expression, locals())
    from stfm.slide.from_anndata import target

    _check_adata(adata)
    check_key("key_added", key_added, taken=(spatial_key, library_key, measured_key))
    _check_source(reference, model)
    fitted, source = (None, "reference") if model is None else _resolve(model)
    if isinstance(fitted, ModelClass):
        return _by_model(
            adata, fitted, source, genes, measured_key, library_key=library_key, spatial_key=spatial_key, layer=layer,
            image=image, mpp=mpp, batch_size=batch_size, device=device, cache=cache, key_added=key_added, copy=copy,
        )  # fmt: skip
    _check_no_context(measured_key)
    targets = as_slides(
        adata, library_key=library_key, spatial_key=spatial_key, image=image, mpp=mpp, modalities=("image",)
    )
    _need_images(targets)
    if fitted is None:
        fitted = fit_expression(
            reference, genes=genes, method=method, rule=rule, features=features, weights=weights,
            contexts_um=contexts_um, rings=rings, tile_px=tile_px,
            library_key=library_key, spatial_key=spatial_key, layer=layer,
            image=_mapping(image), mpp=_mapping(mpp), batch_size=batch_size, device=device, cache=cache, rng=rng,
        )  # fmt: skip
    columns = _columns(fitted, genes if reference is None else None)
    seen = _told(adata, targets, fitted.seen, getattr(features, "seen", None), stacklevel=3)
    how: dict[str, Any] = {"weights": weights, "batch_size": batch_size, "device": device, "cache": cache}
    extractor = SlideFeatures.like(fitted.features, features, **how)
    values = _by_predictor(fitted, targets, extractor, adata.n_obs)[:, columns]
    written = target(adata, copy=copy)
    written.obsm[key_added] = _frame(values, written, [fitted.genes[i] for i in columns])
    written.uns[key_added] = _describe(fitted, source, seen)
    return written if copy else None


def _by_predictor(
    fitted: ExpressionPredictor, slides: Sequence[Slide], extractor: SlideFeatures, n_obs: int
) -> NDArray[np.float32]:
    """Return what a fitted predictor says of every spot, in the order of the object."""
    values = np.empty((n_obs, len(fitted.genes)), np.float32)
    for slide in slides:
        values[slide.rows] = predict_slide(fitted, slide, extractor)
    return values


def _told(adata: AnnData, slides: Sequence[Slide], *sources: Any, stacklevel: int) -> Exposure:
    """Return what of the target was seen in training, and warn of it where somebody may correlate."""
    seen = exposure(slides, *sources)
    if adata.X is not None and adata.n_vars:
        seen.warn(stacklevel=stacklevel)
    return seen


def _by_model(
    adata: AnnData,
    model: Model,
    source: str,
    genes: str | Sequence[str] | None,
    measured_key: str | None,
    *,
    key_added: str,
    copy: bool,
    **how: Any,
) -> AnnData | None:
    """Let a model write the expression of the spots that were not measured."""
    from stfm.slide.from_anndata import target

    if isinstance(genes, str):
        msg = f"genes={genes!r} names a gene set, which is chosen on a reference; of a trained model name the genes."
        raise InputError(msg)
    measured = measured_spots(adata, measured_key)
    written = write_expression(
        adata, model, genes, measured=measured, use_counts=measured is not None, own=False, stacklevel=4, **how
    )
    _need_images(written.slides)
    seen = _told(adata, written.slides, model.seen, stacklevel=4)
    _warn_extrapolated(written.extrapolated, len(written.genes), stacklevel=4)
    result = target(adata, copy=copy)
    result.obsm[key_added] = _frame(written.mean, result, written.genes)
    result.obsm[deviation_key(key_added)] = _frame(written.deviation, result, written.genes)
    used = 0 if measured is None else int(measured.sum())
    result.uns[key_added] = describe_written(
        model, source, written, seen, n_measured=used, extrapolated=written.extrapolated
    )
    return result if copy else None


def _warn_extrapolated(genes: Sequence[str], n_asked: int, *, stacklevel: int) -> None:
    if genes:
        named = ", ".join(map(repr, genes[:3])) + (", ..." if len(genes) > 3 else "")
        msg = (
            f"{len(genes)} of {n_asked} genes ({named}) were measured on no training slide with H&E: their prediction "
            "is an extrapolation by their embeddings; uns lists them under 'extrapolated'."
        )
        warnings.warn(msg, StfmWarning, stacklevel=stacklevel + 1)


def fit_expression(
    reference: Any,
    *,
    genes: str | Sequence[str] | None = None,
    method: Literal["ridge", "mlp"] = "ridge",
    rule: Literal["best", "one_se"] = "best",
    features: str | ImageEncoder | Model = "handcrafted",
    weights: str | Path | None = None,
    contexts_um: Sequence[float] | None = None,
    rings: int = 2,
    tile_px: int = 224,
    n_components: int | Sequence[int] = 256,
    ranks: Sequence[int | None] = RANKS,
    library_key: str | None = None,
    spatial_key: str = SPATIAL,
    layer: str | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    cache: bool = True,
    rng: int | np.random.Generator | None = 0,
) -> ExpressionPredictor:
    """Fit a predictor of expression from H&E, to be saved or used on other slides.

    Parameters
    ----------
    reference
        AnnData, path, slide, or a list of these, with H&E and raw counts.
    genes
        Genes to predict: names, or a gene set of the protocols, ``"hvg250"`` (the default), ``"hvg50"``, ``"hmg250"``.
    method
        ``"ridge"`` or ``"mlp"``.
    rule
        ``"best"`` takes the penalty with the best mean r on held-out sections; ``"one_se"`` the largest within one
        standard error of it, which carries over better to other patients.
    features
        An image encoder by name or as a module; or a trained model: its image and niche parts, and what its frozen
        image encoders saw.
    weights
        Checkpoint of an encoder given by name.
    contexts_um
        Sides of the tiles in µm; by default 112, 224 and 448, or 448 and 1120 where an image is too coarse.
    rings
        Rings of neighbouring spots whose mean features are appended.
    tile_px
        Side in px at which tiles are shown to an encoder; smaller is faster.
    n_components
        Principal components of the features, or several numbers to choose from.
    ranks
        Ranks of the coefficients to choose from; None leaves them as they are.
    library_key
        Column of ``obs`` that names the library of a spot.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    layer
        Layer with raw counts; None takes ``X``.
    image
        H&E, where it is neither in ``uns["spatial"]`` nor recorded; or a mapping from library to it.
    mpp
        µm per px of the full-resolution image; or a mapping from library to it.
    batch_size
        Tiles at once.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    cache
        Whether features are kept on disk for the next time.
    rng
        Seed or generator; used by ``"mlp"``.

    Returns
    -------
    The predictor: ``predict`` on features, ``save(folder)``, ``genes``, ``choice`` (what was chosen on held-out
    sections, and r there).

    Raises
    ------
    InputError
        No H&E or no counts in the reference, or genes that it does not have.

    Examples
    --------
    >>> import stfm as sf
    >>> reference = sf.datasets.toy(n_spots=60, n_patients=2, mpp=4.0)
    >>> predictor = sf.tl.fit_expression(reference, genes=["ERBB2", "MUC1"], rings=0, tile_px=64)
    >>> predictor.genes
    ('ERBB2', 'MUC1')
    >>> predictor.save("predictor")  # and later: predict_expression(adata, model="predictor")
    """
    check_choice("method", method, METHODS)
    slides = as_slides(reference, library_key=library_key, spatial_key=spatial_key, layer=layer, image=image, mpp=mpp)
    _need_images(slides)
    extractor = SlideFeatures.of(
        features, slides, weights=weights, contexts_um=contexts_um, rings=rings, tile_px=tile_px,
        batch_size=batch_size, device=device, cache=cache,
    )  # fmt: skip
    return fit_on_slides(
        slides, extractor, genes="hvg250" if genes is None else genes, method=method,
        n_components=n_components, ranks=ranks, rule=rule, rng=rng,
    )  # fmt: skip


def _check_source(reference: Any, model: Any) -> None:
    if (reference is None) == (model is None):
        msg = "give either reference= (slides with H&E and counts to learn from) or model= (a fitted predictor)."
        raise InputError(msg)


def _check_no_context(measured_key: str | None) -> None:
    if measured_key is not None:
        msg = "measured_key= needs a model that writes expression (storm); one fitted on features reads no counts."
        raise InputError(msg)


def _check_adata(adata: Any) -> None:
    from anndata import AnnData as Class

    if not isinstance(adata, Class):
        msg = f"adata must be AnnData, got {type(adata).__name__}; read a file with anndata.read_h5ad first."
        raise WrongTypeError(msg)


def _need_images(slides: Sequence[Slide]) -> None:
    without = [slide.name for slide in slides if slide.tiles is None]
    if without:
        names = ", ".join(repr(name) for name in without)
        msg = f"library {names} has no H&E; give it with image=, or record it with sf.pp.tile."
        raise InputError(msg)


def _mapping(value: Any) -> Any:
    """Return what was given by library; what was given for the target alone is not the reference's."""
    from collections.abc import Mapping as MappingType

    return value if isinstance(value, MappingType) else None


def _resolve(model: Any) -> tuple[ExpressionPredictor | Model, str]:
    if isinstance(model, ExpressionPredictor):
        return model, "memory"
    if isinstance(model, (str, Path)) and not (isinstance(model, str) and model in WEIGHTS):
        folder = Path(model).expanduser()
        if folder.is_dir() and not (folder / WEIGHTS_FILE).is_file():
            return ExpressionPredictor.load(folder), str(folder)
    if isinstance(model, (str, Path, ModelClass)):
        return resolve_model(model)
    msg = f"model must be a fitted predictor or the folder it was saved to, got {type(model).__name__}."
    raise WrongTypeError(msg)


def _columns(fitted: ExpressionPredictor, genes: str | Sequence[str] | None) -> list[int]:
    """Return which of a predictor's genes are asked for."""
    if genes is None:
        return list(range(len(fitted.genes)))
    if isinstance(genes, str):
        msg = f"genes={genes!r} names a gene set, which is chosen on a reference; of a fitted predictor name the genes."
        raise InputError(msg)
    place = {gene: i for i, gene in enumerate(fitted.genes)}
    absent = [gene for gene in genes if gene not in place]
    if absent:
        msg = f"the predictor has no gene {absent[0]!r}. {nearest_genes(str(absent[0]), fitted.genes)}"
        raise InputError(msg)
    return [place[gene] for gene in genes]


def _describe(fitted: ExpressionPredictor, source: str, seen: Exposure) -> dict[str, Any]:
    """Say how the prediction was made, and what of the target was seen in training."""
    return {
        "scale": SCALE,
        "source": source,
        "model": record(dict(fitted.choice)),
        "features": record(dict(fitted.features)),
        "seen": record(dict(fitted.seen)),
        **record(seen.to_dict()),
    }


def _frame(values: Any, adata: AnnData, genes: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(values, index=adata.obs_names, columns=list(genes))
