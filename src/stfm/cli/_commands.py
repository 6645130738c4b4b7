"""``stfm train``, ``embed`` and ``predict``: open, call one function of ``tl``, write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stfm.cli._inputs import check_output, open_slide

if TYPE_CHECKING:
    from collections.abc import Sequence


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


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

    adata = open_slide(slide)
    check_output(out, suffix=".h5ad")
    tl.embed(adata, model, library_key=library_key, layer=layer, image=image, mpp=mpp)
    adata.write_h5ad(out)
    _say(f"saved {out}")


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

    adata = open_slide(slide)
    known = [open_slide(name) for name in reference]
    check_output(out, suffix=".h5ad")
    source = models.load(features) if Path(features).is_dir() else features
    tl.predict_expression(
        adata, reference=known, features=source, genes=genes or None, layer=layer, image=image, mpp=mpp
    )
    adata.write_h5ad(out)
    _say(f"saved {out}")
