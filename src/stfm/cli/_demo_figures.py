"""Figures of the demo, drawn by ``stfm.pl`` and saved as PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stfm._keys import DOMAIN, PREDICTED

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from stfm.cli._tissue import Tissue
    from stfm.models import Model

DPI = 100
N_SHOWN = 3  # genes in the expression figure
PCA_DOMAIN = "domain_pca"


def draw(tissue: Tissue, model: Model, genes: list[str], out: Path) -> dict[str, str]:
    """Draw every figure into a folder.

    Parameters
    ----------
    tissue
        Slides; the held-out one with everything that was found on it.
    model
        The trained model.
    genes
        Predicted genes, the best predicted ones first.
    out
        Where the PNG files go.

    Returns
    -------
    File name -> caption.
    """
    from stfm import pl

    test, shown = tissue.test, genes[:N_SHOWN]
    captions = {}

    def save(name: str, figure: Any, caption: str) -> None:
        figure.savefig(out / f"{name}.png", dpi=DPI)
        captions[f"{name}.png"] = caption

    save("overview", _overview(tissue, shown), "Found domains and predicted genes beside what is known.")
    save("domains", _domains(tissue), "Spatial domains of the held-out tissue.")
    figure, axes = _grid(2, len(shown))
    pl.predicted_expression(test, shown, image=False, same_scale=True, ax=axes)
    save("expression", figure, f"Measured and predicted expression of the {len(shown)} best predicted genes.")
    figure, axes = _grid(2, 1, width=4.2)
    pl.embedding(test, tissue.truth or DOMAIN, ax=axes[0, 0])
    pl.embedding(test, DOMAIN, ax=axes[0, 1])
    save("embedding", figure, "The embedding, by known and by found domains." if tissue.truth else "The embedding.")
    figure, axes = _grid(1, 1, width=5.5, height=3.6)
    pl.training(model, ax=axes[0, 0])
    save("training", figure, "Losses by epoch; the validation patient or section is one of the training slides.")
    figure, axes = _grid(6, 2, width=1.7, height=1.9)
    pl.tiles(test, 6, ax=axes)
    save("tiles", figure, "What the model sees: spot tiles above, niche tiles below.")
    return captions


def _grid(columns: int, rows: int, *, width: float = 3.4, height: float = 3.1) -> tuple[Any, Any]:
    """Return a figure that no window and no global state knows, and its Axes ``(rows, columns)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _keys(test: AnnData) -> list[str]:
    return [key for key in (DOMAIN, PCA_DOMAIN) if key in test.obs]


def _name(axes: Any, names: list[str]) -> None:
    """Put the method before the score that the plot wrote as title."""
    for one, name in zip(axes, names, strict=True):
        score = one.get_title().partition("(ARI")
        one.set_title(f"{name} (ARI{score[2]}" if score[1] else name, fontsize=10)


def _domains(tissue: Tissue) -> Any:
    from stfm import pl

    names = ["ST-Align", "PCA of genes"]
    figure, axes = _grid(2 + (tissue.truth is not None), 1, width=4.4, height=3.6)
    pl.spatial_domains(tissue.test, _keys(tissue.test), truth=tissue.truth, image=False, ax=axes[0])
    _name(axes[0], ["known", *names] if tissue.truth else names)
    return figure


def _overview(tissue: Tissue, genes: list[str]) -> Any:
    """Return the picture of the README: domains above, two genes below."""
    from stfm import pl

    test, known = tissue.test, tissue.truth is not None
    figure, axes = _grid(4, 2, width=3.2, height=3.0)
    pl.tiles(test, 2, ax=axes[0, 0])  # two above two: as high as the panels beside it
    axes[0, 0].set_title("tiles of spots, of niches", fontsize=10)
    names = ["ST-Align", "PCA of genes"]
    shown = axes[0, 1:] if known else axes[0, 1:3]
    pl.spatial_domains(test, _keys(test), truth=tissue.truth, image=False, legend=False, ax=shown)
    _name(shown, ["known domains", *names] if known else names)
    if not known:
        pl.embedding(test, DOMAIN, ax=axes[0, 3])
    for number, gene in enumerate(genes[:2]):
        pair = axes[1, 2 * number : 2 * number + 2]
        pl.predicted_expression(test, gene, key=PREDICTED, image=False, same_scale=True, ax=pair)
    return figure
