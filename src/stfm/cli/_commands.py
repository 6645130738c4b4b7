"""``stfm train``, ``embed`` and ``predict``: open, call one function of ``tl``, write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stfm.cli._inputs import check_folder, check_output, make_folder, open_slide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def _save(adata: AnnData, out: Path) -> None:
    if made := make_folder(out.parent):
        _say(made)
    adata.write_h5ad(out)
    _say(f"saved {out}")


def train(
    slides: Sequence[str],
    *,
    out: Path,
    model: str,
    epochs: int | None,
    library_key: str | None,
    layer: str | None,
    seed: int,
) -> None:
    """Train a model on slides and save it as one folder."""
    from stfm import tl

    check_folder(out)
    data = [open_slide(name) for name in slides]
    trained = tl.train(data, model, epochs=epochs, library_key=library_key, layer=layer, rng=seed)
    trained.save(out)
    _say(f"saved {model} in {out}")


def embed(
    slide: str,
    *,
    model: str,
    out: Path,
    library_key: str | None,
    layer: str | None,
    image: Path | None,
    mpp: float | None,
) -> None:
    """Write the embedding of every spot and save the slide."""
    from stfm import tl

    check_output(out, suffix=".h5ad")
    adata = open_slide(slide)
    tl.embed(adata, model, library_key=library_key, layer=layer, image=image, mpp=mpp)
    _save(adata, out)


def predict(
    slide: str,
    *,
    reference: Sequence[str],
    out: Path,
    features: str,
    genes: Sequence[str] | None,
    layer: str | None,
    image: Path | None,
    mpp: float | None,
) -> None:
    """Predict expression from H&E alone and save the slide."""
    from stfm import models, tl
    from stfm.weights import WEIGHTS

    check_output(out, suffix=".h5ad")
    adata = open_slide(slide)
    known = [open_slide(name) for name in reference]
    source = models.load(features) if features in WEIGHTS or Path(features).is_dir() else features
    tl.predict_expression(
        adata, reference=known, features=source, genes=genes or None, layer=layer, image=image, mpp=mpp
    )
    _save(adata, out)
