"""Figures of the demo, drawn by ``stfm.pl`` and saved as PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from stfm.cli._demo import Tissue
    from stfm.models import Model

DPI = 110
N_SHOWN = 3  # genes in the expression figure


def draw(tissue: Tissue, model: Model, out: Path) -> dict[str, str]:
    """Save every figure and return file name -> caption."""
    import matplotlib as mpl

    with mpl.rc_context({"backend": "agg", "font.size": 9}):
        captions = {}
        for draw_one in (_domains, _expression, _embedding, _training, _tiles):
            name, caption, figure = draw_one(tissue, model)
            _save(figure, out / name)
            captions[name] = caption
        if tissue.truth is not None:
            _save(_overview(tissue), out / "overview.png")
    return captions


def _figure(columns: int, rows: int = 1, *, width: float = 3.1, height: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
